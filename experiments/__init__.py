"""Recipes, one file per benchmark, and the studies and benchmarks built on them."""
