"""Scores into predictions, predictions into metrics: every example counted exactly once."""
