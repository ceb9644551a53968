"""One file for each command; only `cli` imports them."""
