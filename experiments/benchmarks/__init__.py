"""Benchmark programs; README.md in this folder records their results."""
