"""Reads and writes weights: checkpoints of the gemma package, of Hugging Face and our own."""
