"""Dumps and shards as a person sees them."""
