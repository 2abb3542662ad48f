"""Packing, the order of sequences, mixtures of domains, micro-batches, sampled positions."""
