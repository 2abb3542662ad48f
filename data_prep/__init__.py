"""Prepare data: tokenizers, token stores, evaluation sets, decontamination; one module or folder per verb."""
