"""Perplexity and retrieval against context length: protocols, methods, results that resume."""
