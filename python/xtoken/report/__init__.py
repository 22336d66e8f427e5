"""Pictures of an alignment and of runs."""
