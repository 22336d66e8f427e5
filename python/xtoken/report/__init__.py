"""Pages and pictures of an alignment, a pair and of runs."""
