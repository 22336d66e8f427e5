"""Triton kernels of losses: the same values and gradients as the torch path, in fewer bytes.

`choice` says when they run, `self_check` compares each with torch at its first use. What Triton
compiles is in `device`, which alone imports Triton, and nothing imports it before a kernel runs.
"""
