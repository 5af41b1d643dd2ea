"""Retrieval: indexes of collections, search, and mining of hard negatives."""
