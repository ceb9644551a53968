"""Everything about the plan: the corpus cut into units of work."""
