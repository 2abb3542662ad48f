"""`evaluation.log_scale`: another log-scaling than the model's own, for an evaluation alone."""

import math

import pytest
import torch

from clex_train.config.scaling import LogScale
from clex_train.models.load import LoadedModel
from clex_train.rope.native import install_native
from tests.evaluation.evaluation_models import build_tiny_llama

L = 32


@pytest.mark.parametrize("own", [LogScale.off, LogScale.eval])
@pytest.mark.parametrize("asked", [None, LogScale.off, LogScale.eval])
def test_the_block_has_the_policy_that_was_asked_for_and_the_model_its_own_afterwards(own, asked) -> None:
    model = build_tiny_llama().eval()
    loaded = LoadedModel(model, install_native(model, L), L)
    with loaded.log_scaled(own):
        plain, attention = model.config.head_dim**-0.5, model.model.layers[0].self_attn

        def factor() -> float:
            with torch.no_grad():
                model(torch.ones(1, 4 * L, dtype=torch.long))
            return attention.scaling / plain

        expected = {LogScale.off: 1.0, LogScale.eval: math.log(4 * L) / math.log(L)}
        before = factor()
        with loaded.log_scaled(asked):
            assert factor() == pytest.approx(expected[asked or own])
            assert loaded.log_scale is (asked or own)
        assert factor() == before == pytest.approx(expected[own])
    assert loaded.log_scale is LogScale.off
    assert loaded.log_scaling is None
