"""Byte targets for training: from a folder or a URL, in order, in bounded memory."""
