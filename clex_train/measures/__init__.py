"""Measures beside perplexity and generation, and the evaluation inside a run, which combines them all"""
