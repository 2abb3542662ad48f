"""Differences between two models: the pairs, their size, L, magnitude, layers and lengths."""

from pathlib import Path
from typing import Any

import pytest

from clex_train.inspection import difference
from clex_train.inspection.difference import Difference
from tests.inspection.saved_configs import CONTEXT, HARSH, inspect, longrope, save_config, scaled


def compare(folder: Path, one: dict[str, Any], other: dict[str, Any]) -> Difference:
    first = inspect(save_config(folder / "one", **one))
    return difference.compare(first, inspect(save_config(folder / "other", **other), first.length))


def lists(factors: list[float], magnitude: float = 1.0) -> dict[str, Any]:
    return {"rope_parameters": longrope(CONTEXT, short_factor=factors, long_factor=factors, attention_factor=magnitude)}


def test_equal_models_are_the_same(tmp_path: Path) -> None:
    found = compare(tmp_path, lists(HARSH), lists(HARSH))
    assert found.is_same
    assert (found.ropes[0].largest, found.ropes[0].pairs, found.lines) == (0.0, (), ())


def test_rounding_is_no_difference_but_a_thousandth_is(tmp_path: Path) -> None:
    assert compare(tmp_path / "a", lists(HARSH), lists([f * (1 + 1e-6) for f in HARSH])).is_same
    assert not compare(tmp_path / "b", lists(HARSH), lists([f * (1 + 1e-3) for f in HARSH])).is_same


def test_one_wrong_pair_is_found_with_its_size(tmp_path: Path) -> None:
    wrong = [f * (1.25 if j == 5 else 1) for j, f in enumerate(HARSH)]
    (rope,) = compare(tmp_path, lists(HARSH), lists(wrong)).ropes
    assert (rope.pair, rope.pairs) == (5, (5,))
    # theta / theta_other = factor_other / factor.
    assert rope.largest == pytest.approx(0.25, rel=1e-5)


def test_factors_in_reverse_order_differ_in_every_pair_that_moves(tmp_path: Path) -> None:
    (rope,) = compare(tmp_path, lists(HARSH), lists(HARSH[::-1])).ropes
    assert rope.pairs == tuple(range(8))


def test_a_magnitude_left_on_is_a_difference(tmp_path: Path) -> None:
    found = compare(tmp_path, lists(HARSH), lists(HARSH, 1.118))
    assert found.ropes[0].pairs == ()
    assert found.ropes[0].attention_factors == pytest.approx((1.0, 1.118))
    assert not found.is_same


def test_other_numbers_of_pairs_and_lengths_are_named(tmp_path: Path) -> None:
    plain = {"rope_parameters": scaled("default")}
    found = compare(tmp_path, plain, {**plain, "hidden_size": 128, "max_position_embeddings": 512})
    assert (found.ropes[0].num_pairs, found.ropes[0].pair) == ((8, 16), None)
    assert "L: 256 against 512" in found.lines
    assert "vLLM 0.32 serves 256 against 512 tokens" in found.lines
    assert not found.is_same


def test_layer_types_are_compared_by_name(tmp_path: Path) -> None:
    def gemma(factor: float) -> dict[str, Any]:
        full = {"rope_type": "linear", "factor": factor, "rope_theta": 1_000_000.0}
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        kinds = ["sliding_attention", "full_attention"]
        rope = {"full_attention": full, "sliding_attention": local}
        return {"model_type": "gemma3_text", "layer_types": kinds, "rope_parameters": rope}

    ropes = {rope.name: rope for rope in compare(tmp_path, gemma(8.0), gemma(4.0)).ropes}
    assert ropes["full_attention"].largest == pytest.approx(0.5, rel=1e-5)
    assert ropes["sliding_attention"].is_same
