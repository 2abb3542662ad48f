"""Scaling methods against the functions that they replaced: bitwise equal tables and configs.

The formulas below are copies of those in the library before each method had a class.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.evaluation.methods import tables
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling.frequency_table import scale_grid

L, NEW_BASE = 128, 5e6
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "max_position_embeddings": L,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "partial rotary": GPTNeoXConfig(**SIZES),
    "a type per layer": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=32),
}
GRID = scale_grid(16)


def ntk(base: Tensor) -> Tensor:
    exponents = torch.arange(len(base), dtype=torch.float64) / max(1, len(base) - 1)
    return base.double() * (2 * GRID[:, None] - 1) ** -exponents


def theta(base: Tensor, own_base: float) -> Tensor:
    exponents = torch.arange(len(base), dtype=torch.float64) / max(1, len(base))
    return (base.double() * (own_base / NEW_BASE) ** exponents).expand(len(GRID), -1)


def stock(family: str, parameters_at: Callable[[float], dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the frequencies and attention factors of transformers at every t."""
    rows = []
    for t in GRID.tolist():
        config, kind = FAMILIES[family].__class__(**FAMILIES[family].to_dict()), None
        parameters = config.rope_parameters
        if family == "a type per layer":
            kind, parameters = "full_attention", parameters["full_attention"]
        parameters.update({"original_max_position_embeddings": L, **parameters_at(t)})
        named = {} if kind is None else {"layer_type": kind}
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        rows.append(compute(config, torch.device("cpu"), seq_len=round(t * L), **named))
    return torch.stack([theta.double() for theta, _ in rows]), torch.tensor([factor for _, factor in rows]).double()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def factors(tmp_path: Path, family: str) -> Path:
    num_pairs = len(native_handle_on_meta(FAMILIES[family], L).base_inv_freq)
    lists = {"short_factor": [1 + 0.02 * j for j in range(num_pairs)], "long_factor": [1 + j for j in range(num_pairs)]}
    (tmp_path / "factors.json").write_text(json.dumps(lists))
    return tmp_path / "factors.json"


@pytest.mark.parametrize("dynamic_factor", [None, 2.0])
def test_tables_of_evaluation(family: str, factors: Path, dynamic_factor: float | None) -> None:
    handle = native_handle_on_meta(FAMILIES[family], L)
    base, lists = handle.base_inv_freq, json.loads(factors.read_text())
    spec = EvaluationConfig(longrope_factors=str(factors), rope_theta=NEW_BASE, dynamic_factor=dynamic_factor)
    chosen = ["none", "pi", "ntk", "theta", "random_pos", "lm_infinite", "yarn", "dynamic_ntk", "longrope"]
    found: dict[str, Any] = tables([Method(name) for name in chosen], base_rope(handle), 16 * L, spec)
    plain = base.double().expand(len(GRID), -1)
    closed = {"none": plain, "random_pos": plain, "lm_infinite": plain, "pi": base.double() / GRID[:, None]}
    closed |= {"ntk": ntk(base), "theta": theta(base, base_rope(handle).theta)}
    for name, expected in closed.items():
        assert torch.equal(found[name].inv_freq, expected), name
        assert found[name].attention_factors is None
    of_transformers: dict[str, Callable[[float], dict[str, Any]]] = {
        "yarn": lambda t: {"rope_type": "yarn", "factor": t},
        "dynamic_ntk": lambda t: {"rope_type": "dynamic", "factor": dynamic_factor or t},
        "longrope": lambda t: {"rope_type": "longrope", "factor": t, **lists},
    }
    for name, parameters_at in of_transformers.items():
        expected, attention_factors = stock(family, parameters_at)
        assert torch.equal(found[name].inv_freq, expected), name
        assert torch.equal(found[name].attention_factors, attention_factors), name
    assert [found[name].method for name in ("random_pos", "lm_infinite")] == ["none", "none"]


@pytest.mark.parametrize("factor", [1.0, 2.5, 16.0])
def test_parameters_in_a_config(family: str, factors: Path, factor: float) -> None:
    rope = base_rope(native_handle_on_meta(FAMILIES[family], L))
    pairs, lists = len(rope.inv_freq), json.loads(factors.read_text())
    expected: dict[str, dict[str, Any]] = {
        "pi": {"rope_type": "linear", "factor": factor},
        "ntk": {"rope_theta": rope.theta * (2 * factor - 1) ** (pairs / (pairs - 1))},
        "yarn": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": L},
        "dynamic_ntk": {"rope_type": "dynamic", "factor": factor},
        "theta": {"rope_theta": NEW_BASE},
        "longrope": {"rope_type": "longrope", "factor": factor, "original_max_position_embeddings": L, **lists},
        "random_pos": {},
    }
    for name, added in expected.items():
        if family == "a type per layer" and name in ("dynamic_ntk", "longrope"):
            continue
        scaling = ScalingConfig(
            name=Method(name), positions=Positions.skip, rope_theta=NEW_BASE, longrope_factors=str(factors)
        )
        config: Any = recipes.scaled(FAMILIES[family], scaling, factor, L)
        own: Any = FAMILIES[family]
        before, after = own.rope_parameters, config.rope_parameters
        if family == "a type per layer":
            assert after["sliding_attention"] == before["sliding_attention"]
            before, after = before["full_attention"], after["full_attention"]
        assert after == {**before, **added}, name
        served = L if name == "dynamic_ntk" else round(factor * L)
        assert config.max_position_embeddings == served
