"""Teachers as engines that give rows of path masses."""
