"""Partition KL: the events that both sides can name, and one column for all the rest."""
