"""Distillation losses: one loss a file, a pure function and a thin module."""
