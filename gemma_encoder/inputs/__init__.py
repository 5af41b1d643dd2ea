"""Definitions of a task, a text and a batch, shared by training and inference.

Requires only numpy and sentencepiece.
"""
