"""The command line and the machinery that runs stages: units, receipts, the store, progress."""
