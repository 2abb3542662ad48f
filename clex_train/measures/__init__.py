"""Measures beside perplexity: teacher forcing, lm-eval, and the evaluation inside a run, which combines them all."""
