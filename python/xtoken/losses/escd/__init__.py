"""Event-set completion: BPM's root, and what completes a teacher token that was begun."""
