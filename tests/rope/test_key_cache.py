"""Generation with a KV cache: keys follow t for every cache type, batch and order of requests."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicIndexedLayer

from clex_train.rope.patch import install_rotary
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.none import none_table
from clex_train.scaling.methods.ntk import ntk_table
from tests.rope.cached_calls import PIECES, T_MAX, QuantisedLayers, feed, patched
from tests.rope.rotary_families import CONTEXT, tiny_model, tokens
from tests.rope.unrotated_cache import reference_logits


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_static_cache_follows_t_like_a_dynamic_one(family: str) -> None:
    model, handle, table = patched(family)
    ids = tokens(2, sum(PIECES))
    found = feed(model, ids, PIECES, StaticCache(model.config, max_cache_len=64))
    handle.undo()
    assert torch.allclose(found, reference_logits(model, ids, PIECES, table, CONTEXT), atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [12, 40])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_sliding_window_drops_keys_and_rerotates_the_rest(kind: str, window: int) -> None:
    model, _, _ = patched("gemma2", sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    ids = tokens(1, sum(PIECES))
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
    found = feed(model, ids, PIECES, cache)
    expected = feed(model, ids, PIECES, DynamicCache())
    assert "Sliding" in type(cache.layers[0]).__name__
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)


def test_one_layer_with_a_cache_gives_the_logits_of_one_forward_at_the_final_t() -> None:
    model, _, _ = patched(num_layers=1)
    ids = tokens(2, sum(PIECES))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
    assert torch.allclose(feed(model, ids, PIECES)[:, -1], whole, atol=1e-5, rtol=0)


def test_left_padded_rows_are_rerotated_by_their_own_positions() -> None:
    model, handle, table = patched()
    ids, pad = tokens(3, sum(PIECES)), torch.tensor([0, 5, 9])
    logits, cache, start = [], None, 0
    for length in PIECES:
        stop = start + length
        positions = (torch.arange(start, stop)[None] - pad[:, None]).clamp(min=0)
        mask = (torch.arange(stop)[None] >= pad[:, None]).long()
        with torch.no_grad():
            output = model(
                ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
        cache, start = output.past_key_values, stop
        logits.append(output.logits)
    handle.undo()
    expected = reference_logits(model, ids, PIECES, table, CONTEXT, pad=pad)
    real = torch.arange(sum(PIECES))[None] >= pad[:, None]
    assert torch.allclose(torch.cat(logits, dim=1)[real], expected[real], atol=1e-4, rtol=0)


def test_padding_of_every_row_does_not_count_as_length() -> None:
    model, handle, _ = patched()
    ids, seen = tokens(2, CONTEXT + 4), []
    handle.on_length(seen.append)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert seen == [CONTEXT, CONTEXT + 1, CONTEXT + 2]


def test_generate_agrees_with_and_without_the_cache_for_one_layer() -> None:
    model, _, _ = patched(num_layers=1)
    ids = tokens(2, 8)
    cached = model.generate(ids, max_new_tokens=50, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=50, do_sample=False, use_cache=False))


def test_beam_search_agrees_with_and_without_the_cache_for_one_layer() -> None:
    model, _, _ = patched(num_layers=1)
    ids = tokens(2, 8)
    cached = model.generate(ids, max_new_tokens=40, num_beams=3, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=40, num_beams=3, do_sample=False, use_cache=False))


def test_a_conversation_continues_from_its_cache() -> None:
    model, _, _ = patched(num_layers=1)
    first = model.generate(tokens(1, 12), max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat((first.sequences, tokens(1, 12, seed=5)), dim=1)
    cached = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=20, do_sample=False)
    assert torch.equal(cached, model.generate(turn, max_new_tokens=20, do_sample=False, use_cache=False))


def test_alternating_requests_do_not_affect_each_other() -> None:
    model, _, _ = patched()
    long, short = tokens(1, sum(PIECES)), tokens(1, CONTEXT, seed=3)
    alone_long, alone_short = feed(model, long, PIECES), feed(model, short, [10, 6])
    long_cache, short_cache = DynamicCache(), DynamicCache()
    interleaved = [feed(model, long[:, :40], [40], long_cache)]
    first = feed(model, short[:, :10], [10], short_cache)
    feed(model, long[:, 40:], [8], long_cache)
    assert torch.equal(torch.cat((first, feed(model, short[:, 10:], [6], short_cache)), dim=1), alone_short)
    assert torch.equal(feed(model, long, PIECES), alone_long)
    assert torch.equal(interleaved[0], feed(model, long[:, :40], [40]))


def test_a_copy_of_a_cache_records_the_rotation_of_its_keys() -> None:
    model, _, _ = patched()
    ids, prefix = tokens(1, 40), DynamicCache()
    feed(model, ids[:, :10], [10], prefix)
    branch = copy.deepcopy(prefix)
    straight = feed(model, ids[:, 10:], [30], prefix)
    assert torch.allclose(feed(model, ids[:, 10:], [30], branch), straight, atol=1e-6)


def test_a_cropped_cache_is_rerotated_to_a_smaller_t() -> None:
    model, _, _ = patched(num_layers=1)
    ids, cache = tokens(1, 40), DynamicCache()
    feed(model, ids, [14, 26], cache)
    cache.crop(-28)
    again = feed(model, ids[:, 12:16], [4], cache)
    with torch.no_grad():
        assert torch.allclose(again[:, -1], model(ids[:, :16]).logits[:, -1], atol=1e-5)


def test_a_reset_cache_starts_from_scratch() -> None:
    model, _, _ = patched()
    cache = StaticCache(model.config, max_cache_len=64)
    feed(model, tokens(1, 50, seed=7), [50], cache)
    cache.reset()
    assert torch.allclose(feed(model, tokens(1, 20), [10, 10], cache), feed(model, tokens(1, 20), [10, 10]), atol=1e-5)


def test_pinned_t_does_not_rerotate_keys() -> None:
    model, handle, _ = patched()
    ids = tokens(2, sum(PIECES))
    with handle.pinned(4.0), torch.no_grad():
        found, whole = feed(model, ids, PIECES), model(ids).logits
    assert torch.allclose(found, whole, atol=1e-5, rtol=0)


def test_chunks_at_a_fixed_length_equal_one_forward() -> None:
    model, handle, _ = patched()
    ids = tokens(2, sum(PIECES))
    with torch.no_grad():
        whole = model(ids).logits
    with handle.fixed(ids.shape[1]):
        assert torch.allclose(feed(model, ids, PIECES), whole, atol=1e-5, rtol=0)


def test_another_table_rerotates_existing_keys() -> None:
    model, handle, table = patched(num_layers=1)
    ids, cache = tokens(1, 40), DynamicCache()
    handle.use(none_table(handle.base_inv_freq, scale_grid(T_MAX)))
    feed(model, ids[:, :36], [36], cache)
    handle.use(table)
    last = feed(model, ids[:, 36:], [4], cache)[:, -1]
    with torch.no_grad():
        assert torch.allclose(last, model(ids).logits[:, -1], atol=1e-5)


def test_sixteen_crossings_leave_float32_keys_within_rounding() -> None:
    model = tiny_model("llama")
    handle = install_rotary(model, 4)
    table = ntk_table(handle.base_inv_freq, scale_grid(20.0))
    handle.use(table)
    ids, pieces = tokens(1, 72), [4] * 18
    found = feed(model, ids, pieces)
    handle.undo()
    assert torch.allclose(found, reference_logits(model, ids, pieces, table, 4), atol=1e-4, rtol=0)


def test_keys_of_unknown_rotation_are_refused() -> None:
    model = tiny_model("llama")
    cache = DynamicCache()
    feed(model, tokens(1, 8), [8], cache)
    install_rotary(model, CONTEXT)
    with pytest.raises(ValueError, match="the KV cache holds 8 keys of unknown rotation"):
        feed(model, tokens(1, 1), [1], cache)


@pytest.mark.parametrize("residual_length", [1, 8, 100])
def test_quantised_keys_are_rerotated_with_those_not_yet_quantised(residual_length: int) -> None:
    model, _, _ = patched()
    ids = tokens(2, sum(PIECES))
    exact = feed(model, ids, PIECES)
    found = feed(model, ids, PIECES, QuantisedLayers(steps=None, residual_length=residual_length))
    assert torch.allclose(found, exact, atol=1e-5, rtol=0)


def test_the_error_of_quantisation_does_not_grow_when_t_moves() -> None:
    model, handle, _ = patched()
    ids, errors = tokens(2, sum(PIECES)), []
    for context in (handle.pinned(4.0), nullcontext()):
        with context:
            exact = feed(model, ids, PIECES)
            errors.append((feed(model, ids, PIECES, QuantisedLayers(steps=32.0)) - exact).square().mean().sqrt())
    pinned, moving = errors
    assert 0 < pinned < 0.1
    assert moving < 1.5 * pinned


def test_a_cache_whose_keys_cannot_be_rerotated_is_refused_by_name_when_t_moves() -> None:
    model, handle, _ = patched()

    class Unknown(DynamicIndexedLayer):
        pass

    with handle.pinned(3.0):
        feed(model, tokens(1, 24), [10, 14], Cache(layer_class_to_replicate=Unknown))
    with pytest.raises(ValueError, match=r"cache=Cache: t moves .* keys in a Unknown .* pin t"):
        feed(model, tokens(1, 24), [10, 14], Cache(layer_class_to_replicate=Unknown))


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_gives_the_greedy_answer_at_a_pinned_t(lookup: bool) -> None:
    model, handle, _ = patched()
    assistant, other, _ = patched(num_layers=1)
    help_with = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": assistant}
    ids = tokens(1, 12).repeat(1, 2)
    with handle.pinned(4.0), other.pinned(4.0):
        greedy = model.generate(ids, max_new_tokens=30, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **help_with), greedy)


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_across_a_move_of_t_is_reported_once(
    lookup: bool, pin: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, handle, _ = patched()
    assistant, other, _ = patched(num_layers=1)
    help_with = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": assistant}
    with (
        caplog.at_level("WARNING", logger="clex_train"),
        handle.pinned(4.0) if pin else nullcontext(),
        other.pinned(4.0) if pin else nullcontext(),
    ):
        for seed in range(4):
            ids = tokens(1, 12, seed=seed).repeat(1, 2)
            model.generate(ids, max_new_tokens=30, do_sample=False, **help_with)
    said = [record for record in caplog.records if "assisted decoding" in record.getMessage()]
    assert len(said) <= (0 if pin else 2 - lookup)
    assert pin or said


def test_chunks_and_a_new_turn_on_a_cropped_cache_are_not_mistaken_for_assisted_decoding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _, _ = patched()
    ids = tokens(1, 40)
    with caplog.at_level("WARNING", logger="clex_train"):
        cache = model(ids[:, :10], use_cache=True).past_key_values
        cache = model(ids[:, 10:40], past_key_values=cache, use_cache=True).past_key_values
        cache.crop(-30)
        model(ids[:, 10:40], past_key_values=cache, use_cache=True)
    assert not caplog.records


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_leaves_a_consistent_cache(lookup: bool) -> None:
    model, _, _ = patched(num_layers=1)
    assistant, _, _ = patched(num_layers=1)
    help_with = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": assistant}
    ids, seen = tokens(1, 12).repeat(1, 2), []
    model.model.register_forward_hook(lambda module, *_: seen.append(module.rotary_emb.spectrum.t))
    answer = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, **help_with)
    assert len(set(seen)) >= 3, "t has moved while candidates came and went"
    turn = torch.cat((answer.sequences, tokens(1, 6, seed=5)), dim=1)
    cached = model.generate(turn, past_key_values=answer.past_key_values, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(turn, max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize("layers", [1, 2])
def test_sampling_draws_the_same_tokens_with_and_without_the_cache(layers: int) -> None:
    model, handle, _ = patched(num_layers=layers)
    ids, answers = tokens(2, 8), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with nullcontext() if layers == 1 else handle.pinned(3.0):
            answers.append(model.generate(ids, max_new_tokens=30, do_sample=True, use_cache=use_cache))
    assert torch.equal(*answers)


@torch.no_grad()
def test_bfloat16_keys_after_sixteen_crossings_are_nearly_as_accurate_as_unrotated_ones() -> None:
    ids, pieces = tokens(4, 72), [4] * 18
    exact_model = tiny_model("llama")
    handle = install_rotary(exact_model, 4)
    table = ntk_table(handle.base_inv_freq, scale_grid(20.0))
    handle.undo()
    exact = reference_logits(exact_model, ids, pieces, table, 4)
    rounded = tiny_model("llama", dtype=torch.bfloat16)
    rounded.model.rotary_emb = copy.deepcopy(exact_model.model.rotary_emb)
    unrotated = reference_logits(rounded, ids, pieces, table, 4)
    handle = install_rotary(rounded, 4)
    handle.use(table)
    turned = feed(rounded, ids, pieces)
    ours, official = ((logits.float() - exact).square().mean().sqrt() for logits in (turned, unrotated))
    assert ours < 1.5 * official
