"""What a student learns by."""
