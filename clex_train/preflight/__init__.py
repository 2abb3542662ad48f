"""Checks and plans before anything expensive: kernels, memory of a run, dry run, out-of-memory advice."""
