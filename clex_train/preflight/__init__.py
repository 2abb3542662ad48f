"""Checks and plans before anything expensive: memory of a run, dry run, out-of-memory advice."""
