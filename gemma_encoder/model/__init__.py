"""The model: Gemma 2 and Gemma 3 transformers with a mask switch, poolers and heads. JAX and Flax only."""
