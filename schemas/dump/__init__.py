"""Token dumps: windows of evaluated histories, one Parquet part per unit (TOKEN_DUMP.md)."""
