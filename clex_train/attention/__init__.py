"""Attention of a model: back end, document masks, log-scaling, Ulysses, queries in chunks."""
