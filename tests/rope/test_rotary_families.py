"""Checks of every rotary family: unchanged at t = 1, gradients, cached keys that follow t, complete undo."""

import pytest
from packaging.version import Version

from tests.rope import family_checks as checks
from tests.rope.family_table import PAGE, render
from tests.rope.rotary_families import FAMILIES, TRANSFORMERS

WITHOUT_LOG_SCALING = {"falcon"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_logits_within_l_equal_those_of_the_untouched_model(family: str) -> None:
    assert checks.error_at_one(family) < checks.AT_ONE


def test_gradients_reach_every_scaled_frequency(family: str) -> None:
    assert checks.num_frequencies_without_gradient(family) == 0


def test_cached_keys_follow_t_over_three_crossings(family: str) -> None:
    assert checks.error_over_crossings(family) < checks.CROSSINGS


def test_generation_is_equal_with_and_without_a_cache(family: str) -> None:
    if family == "phi3" and Version("5.20") > TRANSFORMERS:
        pytest.skip("generate() of these versions drops the cache of Phi-3 at L and reads one token")
    assert checks.generation_agrees(family)


def test_undo_restores_the_logits_bitwise(family: str) -> None:
    assert checks.is_undone(family)


def test_log_scaling_reaches_the_softmax_scale(family: str) -> None:
    assert checks.responds_to_log_scaling(family) is (family not in WITHOUT_LOG_SCALING)


@pytest.mark.skipif(Version("5.20") > TRANSFORMERS, reason="the table is that of newer versions of transformers")
def test_the_table_in_the_docs_is_up_to_date_with_these_checks() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tests/rope/family_table.py"
