"""What pretraining a small decoder needs: a trigram baseline and the tokenizer's training."""
