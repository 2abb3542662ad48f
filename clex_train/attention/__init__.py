"""Attention of a model: back end, masks of documents and bands, padding, log-scaling, Ulysses, queries in chunks."""
