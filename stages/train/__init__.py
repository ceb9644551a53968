"""Training a student from byte targets."""
