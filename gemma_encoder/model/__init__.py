"""The model: Gemma 2 and 3 transformers with a mask switch, poolers and heads.

Depends on JAX and Flax only.
"""
