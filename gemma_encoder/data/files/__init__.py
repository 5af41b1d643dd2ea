"""Readers for the files of users and benchmarks: tables, collections, runs and qrels."""
