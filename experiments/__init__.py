"""Recipes, one file per benchmark, and the studies and benchmarks that use them."""
