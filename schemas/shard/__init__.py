"""Shards of byte targets, one Zarr group in a zip each (SPEC.md)."""
