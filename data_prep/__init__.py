"""Prepare data: tokenizers, token stores, evaluation sets, decontamination; one module a verb."""
