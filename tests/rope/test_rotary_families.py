"""Checks of every rotary family: unchanged at t = 1, gradients, cached keys that follow t, complete undo."""

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache

from clex_train.attention import kv_cache
from clex_train.rope.native import install_native
from clex_train.rope.preallocated_cache import new_cache
from clex_train.rope.receptive_field import require_scalable_config
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.utils.errors import ConfigError
from tests.rope import family_checks as checks
from tests.rope.family_table import PAGE, render
from tests.rope.rotary_families import (
    CONTEXT,
    FAMILIES,
    REFUSED,
    TRANSFORMERS,
    from_config,
    tiny_config,
    tiny_model,
    tokens,
)

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


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_LOG_SCALING))
def test_log_scaling_by_token_is_the_same_in_pieces_and_in_one_forward(family: str) -> None:
    in_pieces, moved = checks.token_scaling_errors(family)
    assert in_pieces < checks.AT_ONE < 1e-3 < moved


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_extended_is_refused_in_one_line_without_weights(name: str) -> None:
    model_type, settings, reason = REFUSED[name]
    with pytest.raises(ConfigError) as refused:
        require_scalable_config(tiny_config(model_type, settings), CONTEXT)
    assert model_type in str(refused.value)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_chunked_layers_and_complex_rotations_are_computed_unchanged() -> None:
    # Llama 4 cannot be extended, but is evaluated and trained as it is.
    torch.manual_seed(0)
    model = from_config(tiny_config(*REFUSED["Llama 4"][:2])).eval()
    ids = tokens(2, 2 * CONTEXT)
    before = model(ids).logits
    handle = install_native(model, CONTEXT)
    assert handle.scaled_layers == {0: False, 1: False}
    assert torch.allclose(model(ids).logits, before, atol=checks.AT_ONE, rtol=0)
    handle.undo()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_5_text"])
@torch.no_grad()
def test_the_cache_of_an_evaluation_follows_t_under_latent_and_linear_attention(family: str, on_host: bool) -> None:
    model, ids = tiny_model(family), tokens(2, 40)
    handle = install_native(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, checks.GRID))

    def read(cache: DynamicCache) -> torch.Tensor:
        pieces = ids.split([10, 8, 1, 21], dim=1)
        return torch.cat([model(each, use_cache=True, **kv_cache.as_kwargs(model, cache)).logits for each in pieces], 1)

    expected = read(DynamicCache(config=model.config))
    assert torch.allclose(read(new_cache(model, 40, on_host)), expected, atol=1e-5, rtol=0)


def test_positions_of_images_are_refused() -> None:
    model = tiny_model("qwen3_5_text")
    handle, positions = install_native(model, CONTEXT), torch.arange(CONTEXT).expand(3, 1, -1).clone()
    handle.rotary(torch.zeros(1, CONTEXT, 1), positions)
    positions[1] += 1
    with pytest.raises(ValueError, match="several coordinates: text only"):
        handle.rotary(torch.zeros(1, CONTEXT, 1), positions)


@pytest.mark.skipif(Version("5.20") > TRANSFORMERS, reason="the table is that of newer versions of transformers")
def test_the_table_in_the_docs_is_up_to_date_with_these_checks() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tests/rope/family_table.py"
