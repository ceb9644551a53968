"""Several teachers' data sets of one text as one."""
