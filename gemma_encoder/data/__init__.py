"""Sources whose records are read by number, the order of training, and packed batches."""
