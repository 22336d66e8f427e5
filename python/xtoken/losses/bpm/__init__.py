"""Byte-prefix marginalization: the teacher's mass on what its tokens begin with."""
