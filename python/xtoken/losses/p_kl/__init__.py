"""P-KL: KL in the teacher's vocabulary, with the student projected there by W."""
