"""Tokenize a corpus into a store: engines, cutting long documents, sampling a part, shards in worker processes."""
