"""Benchmarks and other tasks, one module each."""
