"""Checkpoints of a run: write in the background, verify by checksum, load, resume on another number of ranks."""
