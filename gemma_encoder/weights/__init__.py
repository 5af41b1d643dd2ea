"""Weights in and out: the gemma package's checkpoints, Hugging Face's, and our own."""
