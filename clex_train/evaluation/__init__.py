"""Perplexity and retrieval against context length, confidence intervals, the report."""
