"""Measures beside perplexity: teacher forcing, and the evaluation inside a run, which combines them all."""
