"""Benchmarks and other tasks, a module each."""
