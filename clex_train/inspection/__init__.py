"""Inspection of a saved model: the frequencies it loads, and what transformers and serving engines make of it."""
