"""A data set folder: its index, its card, what is wrong with it."""
