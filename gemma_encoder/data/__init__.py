"""Data sources with random access to records, training order, and packed batches."""
