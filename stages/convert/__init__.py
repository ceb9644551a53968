"""Token dumps to byte-target shards."""
