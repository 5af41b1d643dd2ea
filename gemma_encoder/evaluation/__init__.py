"""Evaluation: predictions from scores, metrics from predictions; each example counts once."""
