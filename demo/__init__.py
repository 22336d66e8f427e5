"""The demonstration: real teacher, small student, real text, one command (`python -m demo`)."""
