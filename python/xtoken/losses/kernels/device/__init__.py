"""What Triton compiles; imported when a kernel runs. Its language has no types that mypy knows."""
