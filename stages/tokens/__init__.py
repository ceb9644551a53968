"""Tokenizers as exact bytes."""
