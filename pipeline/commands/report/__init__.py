"""What a run came to: the table that it ends with, and a page with pictures."""
