"""Caches that other tools wrote: what they list of a teacher, as a token dump."""
