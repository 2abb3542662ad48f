"""Check of an exported directory that no engine's own rule escapes; raises `AssertionError` for a wrong one.

transformers runs the model itself, on both sides of L. vLLM 0.32 and SGLang 0.5.23 compute their rotary tables from the
same keys by rules of their own, which are written out here and compared with theta(t) at every position.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clex_train.models.load import LoadedModel
from tests.export.harsh_models import T, load_plain, log_p
from tests.rope.rotary_families import CONTEXT, tokens

LENGTHS = (CONTEXT // 2, CONTEXT, CONTEXT + 1, int(T) * CONTEXT)
TOLERANCE = 1e-4
"""Of log p; 1e-6 was measured for every family."""
TABLE = 1e-5
"""Of cos and sin: float32 phases of at most 64 tokens."""


def check(directory: Path, reference: LoadedModel, t: float = T) -> None:
    """Compare a directory with the product's model pinned to `t`, in numbers, tokens and rotary tables."""
    model = load_plain(directory)
    spectrum = reference.handle.table.at(t)
    with reference.handle.pinned(t):
        for length in LENGTHS:
            ids = tokens(2, length)
            error = (log_p(model, ids) - log_p(reference.model, ids)).abs().max()
            assert error <= TOLERANCE, f"{length} tokens: log p differs by {error:.2g}"
        prompt = tokens(2, CONTEXT - 4)
        answers = [each.generate(prompt, max_new_tokens=12, do_sample=False) for each in (model, reference.model)]
    assert torch.equal(*answers), "greedy continuation across L"
    own_factor = reference.handle.rotary.own_factor[reference.handle.traits.scaled]
    check_tables(json.loads((directory / "config.json").read_text()), spectrum.inv_freq, own_factor, t)


def check_tables(config: dict[str, Any], inv_freq: Tensor, magnitude: float, t: float) -> None:
    """Compare the rotary tables of vLLM and SGLang with theta(t) at every position up to t L."""
    served = round(t * CONTEXT)
    assert config["max_position_embeddings"] == served, "length served"
    assert config.get("original_max_position_embeddings", served) == served, "vLLM serves this many under longrope"
    parameters = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    expected = _table(inv_freq, torch.arange(served), magnitude)
    for name, engine in (("vLLM", vllm_table), ("SGLang", sglang_table)):
        found = engine(parameters, config["max_position_embeddings"])
        assert found.shape == expected.shape, name
        assert torch.allclose(found, expected, atol=TABLE, rtol=0), f"{name}: rotary table"


def vllm_table(parameters: dict[str, Any], max_position: int) -> Tensor:
    """Return cos and sin [S, 2P] as `phi3_long_rope_scaled_rope.py` of vLLM builds them; one list for all positions."""
    original = parameters["original_max_position_embeddings"]
    is_long = max_position > original
    scale = max_position / original
    automatic = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    magnitude = parameters.get("long_mscale" if is_long else "short_mscale", automatic)
    return _table(_divided(parameters, "long" if is_long else "short"), torch.arange(max_position), magnitude)


def sglang_table(parameters: dict[str, Any], max_position: int) -> Tensor:
    """Return cos and sin [S, 2P] as a decoding step of SGLang reads them, one position at a time."""
    original = parameters["original_max_position_embeddings"]
    scale = max_position / original
    automatic = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    short, long = (
        _table(_divided(parameters, kind), torch.arange(rows), parameters.get(f"{kind}_mscale", automatic))
        for kind, rows in (("short", original), ("long", max_position))
    )
    both = torch.cat((short, long))
    # `rope_variant.py`: the long table starts behind the short one, but a step whose last position is exactly
    # `original` is not beyond it, and reads row `original`, the first of the long table.
    return torch.stack([both[position + (original if position > original else 0)] for position in range(max_position)])


def _divided(parameters: dict[str, Any], kind: str) -> Tensor:
    factors = torch.tensor(parameters[f"{kind}_factor"], dtype=torch.float64)
    pairs = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    return parameters["rope_theta"] ** -pairs / factors


def _table(inv_freq: Tensor, positions: Tensor, magnitude: float) -> Tensor:
    angles = positions[:, None].double() * inv_freq.double()
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude
