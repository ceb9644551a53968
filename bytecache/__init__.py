"""bytecache: an offline teacher cache for byte-level distillation."""
