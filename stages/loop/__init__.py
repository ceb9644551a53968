"""Byte targets in a training loop of your own: rows of the student's tokens, a collator, and the loss."""
