"""Documents from files, their names, and conversations."""
