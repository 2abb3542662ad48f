"""Rows of a KV cache move with their positions; recorded caches are copied and freed like any other."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from clex_train.rope.preallocated_cache import new_cache
from tests.rope.cached_calls import QuantisedLayers, feed, padded_call, patched
from tests.rope.rotary_families import tokens

ROW_CHANGES = {
    "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
    "batch_select_indices": (torch.tensor([1, 2]), [1, 2]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("kind", ["dynamic", "growing", "quantised"])
@pytest.mark.parametrize("method", ROW_CHANGES)
@torch.no_grad()
def test_positions_travel_with_the_rows_of_a_cache(method: str, kind: str) -> None:
    model, _, _ = patched(num_layers=1)
    argument, order = ROW_CHANGES[method]
    if kind == "quantised" and method != "reorder_cache":
        pytest.skip("a quantised layer of transformers cannot change its number of rows")
    if kind == "quantised" and not hasattr(QuantizedLayer, "_apply_pending_reorder"):
        pytest.skip("this transformers moves only those rows of a quantised layer that are not yet quantised")
    kinds = {
        "dynamic": DynamicCache,
        "growing": lambda: new_cache(model, 40),
        "quantised": lambda: QuantisedLayers(None),
    }
    cache, pad = kinds[kind](), [0, 5, 9]
    model(**padded_call(pad, 15), past_key_values=cache, use_cache=True)
    getattr(cache, method)(argument)
    later = {name: value[order] for name, value in padded_call(pad, 34, start=15).items()}
    found = model(**later, past_key_values=cache, use_cache=True).logits
    whole = {name: value[order] for name, value in padded_call(pad, 34).items()}
    assert torch.allclose(found, model(**whole, use_cache=False).logits[:, 15:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_copy_of_a_cache_moves_its_own_rows() -> None:
    model, _, _ = patched(num_layers=1)
    cache, pad, order = DynamicCache(), [0, 9], torch.tensor([1, 0])
    model(**padded_call(pad, 15), past_key_values=cache, use_cache=True)
    twin = copy.deepcopy(cache)
    twin.reorder_cache(order)
    later = padded_call(pad, 34, start=15)
    found = model(**later, past_key_values=cache, use_cache=True).logits
    turned = {name: value[order] for name, value in later.items()}
    assert torch.allclose(model(**turned, past_key_values=twin).logits, found[order], atol=1e-6, rtol=0)


@torch.no_grad()
def test_dropped_rows_do_not_count_for_the_length() -> None:
    model, handle, _ = patched()
    cache, seen = DynamicCache(), []
    model(**padded_call([0, 9], 15), past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor([1]))
    handle.on_length(seen.append)
    later = {name: value[1:] for name, value in padded_call([0, 9], 16, start=15).items()}
    model(**later, past_key_values=cache, use_cache=True)
    assert seen == [7]


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(model.config, max_cache_len=64),
    "growing": lambda model: new_cache(model, 64),
    "host": lambda model: new_cache(model, 64, on_host=True),
}


@pytest.mark.parametrize("kind", CACHES)
def test_keys_are_freed_with_their_cache_without_the_cyclic_collector(kind: str) -> None:
    model, _, _ = patched(num_layers=1)
    cache = CACHES[kind](model)
    feed(model, tokens(1, 20), [10, 10], cache)
    gc.collect()
    gc.disable()
    try:
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_copies_and_pickles_of_a_cache_have_its_type_and_move_their_own_rows(kind: str, duplicate: Any) -> None:
    model, _, _ = patched(num_layers=1)
    cache, pad, order = CACHES[kind](model), [0, 9], torch.tensor([1, 0])
    before = type(cache)
    model(**padded_call(pad, 15), past_key_values=cache, use_cache=True)
    twin = duplicate(cache)
    assert type(twin) is type(cache)
    assert isinstance(twin, before)
    assert type(twin).__name__ == before.__name__
    twin.reorder_cache(order)
    later = padded_call(pad, 34, start=15)
    found = model(**later, past_key_values=cache, use_cache=True).logits
    turned = {name: value[order] for name, value in later.items()}
    assert torch.allclose(model(**turned, past_key_values=twin).logits, found[order], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_shallow_copy_moves_shared_rows_once() -> None:
    model, _, _ = patched(num_layers=1)
    cache, pad, order = DynamicCache(), [0, 5, 9], torch.tensor([2, 0, 1])
    model(**padded_call(pad, 15), past_key_values=cache, use_cache=True)
    twin = copy.copy(cache)
    expected = copy.deepcopy(cache)
    expected.reorder_cache(order)
    twin.reorder_cache(order)
    later = {name: value[order] for name, value in padded_call(pad, 34, start=15).items()}
    found = model(**later, past_key_values=twin, use_cache=True).logits
    assert torch.equal(found, model(**later, past_key_values=expected, use_cache=True).logits)


@torch.no_grad()
def test_moved_beams_keep_the_length_without_reading_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handle, _ = patched()
    cache, seen = DynamicCache(), []
    model(**padded_call([0, 0, 9, 9], 15), past_key_values=cache, use_cache=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "max", None)
        cache.reorder_cache(torch.tensor([1, 1, 3, 2]))
    handle.on_length(seen.append)
    model(**padded_call([0, 0, 9, 9], 16, start=15), past_key_values=cache, use_cache=True)
    assert seen == [16]


def test_rows_changed_without_the_cache_are_refused_when_t_moves() -> None:
    model, _, _ = patched()
    cache = DynamicCache()
    position_ids = torch.arange(10).expand(2, -1)
    with torch.no_grad():
        model(tokens(2, 10), position_ids=position_ids, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="4 rows, but its keys were written by 2"):
        feed(model, tokens(4, 20), [20], cache)
