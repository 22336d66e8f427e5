"""Prefix KL: P-KL on first pieces plus the divergences at every further piece."""
