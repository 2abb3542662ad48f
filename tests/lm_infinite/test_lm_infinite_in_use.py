"""LM-Infinite in use: refused calls that would give wrong numbers, and supported user actions."""

import pickle

import pytest
import torch

from clex_train.lm_infinite.install import apply_lm_infinite
from tests.rope.rotary_families import tiny_model, tokens


def test_changing_the_attention_while_applied_is_refused():
    model = tiny_model("llama")
    handle = apply_lm_infinite(model, 12, 3)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"^attn_implementation=sdpa: lm_infinite is applied"):
        model(tokens(1, 4))
    handle.undo()
    model(tokens(1, 4))


def test_undoing_an_earlier_handle_does_not_affect_a_later_one():
    model, ids = tiny_model("llama", dtype=torch.float64), tokens(1, 30)
    first = apply_lm_infinite(model, 12, 3)
    with torch.no_grad():
        expected = model(ids).logits
        first.undo()
        apply_lm_infinite(model, 12, 3)
        first.undo()
        assert torch.equal(model(ids).logits, expected)


def test_a_cache_that_would_give_wrong_numbers_is_refused():
    model, ids = tiny_model("llama"), tokens(1, 8)
    filled = model(ids, use_cache=True).past_key_values
    other = apply_lm_infinite(model, 6, 2)
    foreign = other.new_cache()
    other.undo()
    handle = apply_lm_infinite(model, 12, 3)
    with pytest.raises(ValueError, match=r"^cache=DynamicCache: it was filled without lm_infinite"):
        model(ids, past_key_values=filled)
    with pytest.raises(ValueError, match=r"^cache=LambdaCache: made for n_local=6, n_global=2, not for 12"):
        model(ids, past_key_values=foreign)
    with pytest.raises(ValueError, match=r"^use_cache=False with a KV cache"):
        model(ids, past_key_values=handle.new_cache(), use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon"])
def test_a_constant_cache_is_refused_after_undo_and_works_once_reapplied(family):
    model, ids = tiny_model(family), tokens(1, 12)
    handle = apply_lm_infinite(model, 6, 2)
    cache, empty = handle.new_cache(), handle.new_cache()
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        handle.undo()
        for held in (cache, empty):
            with pytest.raises(ValueError, match=r"^cache=LambdaCache: lm_infinite is not applied to this model"):
                model(ids[:, 8:9], past_key_values=held, use_cache=True)
        apply_lm_infinite(model, 6, 2)
        found = model(ids[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("held", "new"), [(2, 1), (1, 2), (2, 3)])
def test_a_constant_cache_with_another_batch_size_is_refused_unchanged(held, new):
    model, ids = tiny_model("llama"), tokens(3, 12)
    handle = apply_lm_infinite(model, 6, 2)
    cache, mask = handle.new_cache(), torch.ones(new, 9, dtype=torch.int64)
    mask[-1, 0] = 0
    with torch.no_grad():
        expected = model(ids[:held]).logits
        model(ids[:held, :8], past_key_values=cache)
        for padding in (None, mask):
            with pytest.raises(ValueError, match=rf"^cache=LambdaCache: it holds {held} rows, the call has {new}"):
                model(ids[:new, 8:9], past_key_values=cache, attention_mask=padding)
        found = model(ids[:held, 8:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "llama"])
def test_a_static_cache_is_refused_by_name(family):
    model = tiny_model(family)
    apply_lm_infinite(model, 12, 3)
    with pytest.raises(ValueError, match=r"^cache=StaticCache: lm_infinite supports a LambdaCache"):
        model.generate(tokens(1, 4), max_new_tokens=4, cache_implementation="static")


def test_a_cache_can_be_continued_outside_inference_mode():
    model, ids = tiny_model("llama"), tokens(1, 30)
    handle = apply_lm_infinite(model, 6, 2)
    cache, again = handle.new_cache(), handle.new_cache()
    with torch.inference_mode():
        model(ids[:, :20], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=again)
        for step in range(20, 30):
            found, expected = (model(ids[:, step : step + 1], past_key_values=held).logits for held in (cache, again))
            assert torch.equal(found, expected)


def test_keys_have_the_dtype_of_values_under_autocast():
    model, ids = tiny_model("llama"), tokens(2, 30)
    handle = apply_lm_infinite(model, 12, 3)
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            cache = handle.new_cache()
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([20, 1, 9], dim=1)]
    assert cache.layers[0].keys.dtype is torch.bfloat16
    assert (torch.cat(pieces, dim=1).float() - expected).norm() < 0.03 * expected.norm()


def test_a_model_can_be_pickled_while_applied():
    model, ids = tiny_model("llama"), tokens(1, 30)
    apply_lm_infinite(model, 12, 3)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)
