"""Pretraining of a small decoder: a trigram baseline and the training of its tokenizer."""
