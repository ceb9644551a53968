"""Units of work: the runner, receipts and progress."""
