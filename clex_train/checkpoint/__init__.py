"""Checkpoints of a run: write beside training, verify by checksum, load, resume on another number of ranks."""
