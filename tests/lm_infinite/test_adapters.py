"""LM-Infinite on models with custom attention code: GPT-J, Falcon (RoPE and ALiBi), MPT and Bloom."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from clex_train.lm_infinite.install import apply_lm_infinite
from tests.lm_infinite.dense_lambda import Unrotated, dense_lambda

VOCABULARY = 61
FAMILIES = {
    "gptj": ("gptj", {"n_embd": 48, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 64}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_multi_query": ("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}),
    "bloom": ("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 2}),
}
ROTARY = ["gptj", "falcon", "falcon_multi_query"]
SLOPED = ["falcon_alibi", "mpt", "bloom"]


def small_model(family: str, num_layers: int = 2, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    kind, settings = FAMILIES[family]
    settings = {**settings, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "falcon":
        settings |= {"hidden_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    config.num_hidden_layers = num_layers
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query_key_value", "Wqkv")):
                parameter.mul_(8)
    return model


def tokens(num_rows: int, num_tokens: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (num_rows, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_unchanged_within_the_window_and_after_undo(family):
    model, ids = small_model(family), tokens(2, 24)
    with torch.no_grad():
        plain = model(ids).logits
        handle = apply_lm_infinite(model, 24, 4, block_len=7)
        within = model(ids).logits
        handle.undo()
        again = model(ids).logits
    torch.testing.assert_close(within, plain, rtol=0, atol=1e-6)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_plain_attention_within_the_window(family):
    model, ids, gradients = small_model(family), tokens(2, 20), []
    for n_local in (None, 20):
        handle = None if n_local is None else apply_lm_infinite(model, n_local, 2, block_len=6)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        if handle is not None:
            handle.undo()
    # cos and sin are float32 where used, and so are the attention weights of MPT and Bloom.
    tolerance = 1e-10 if family == "falcon_alibi" else 1e-5
    for ours, plain in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_caches_do_not_change_results_beyond_the_window(family):
    """Compare one forward past the trained context with other block lengths, and with both caches fed in pieces."""
    model, ids = small_model(family), tokens(2, 90)
    with torch.no_grad():
        handle = apply_lm_infinite(model, 12, 3, block_len=128)
        whole = model(ids).logits
        handle.undo()
        handle = apply_lm_infinite(model, 12, 3, block_len=7)
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-6)
        for cache in (handle.new_cache(), DynamicCache()):
            pieces = ids.split([1, 5, 17, 1, 14, 2, 50], dim=1)
            outputs = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
            torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ROTARY)
def test_a_layer_beyond_the_window_is_plain_attention_over_visible_tokens(family):
    """Use one layer, which only sees embeddings, so that the plain model can get G starting tokens at distance L."""
    n_local, n_global, num_tokens = 12, 3, 30
    model, ids = small_model(family, num_layers=1), tokens(2, num_tokens)
    seen = torch.cat((ids[:, :n_global], ids[:, -n_local:]), dim=1)
    positions = torch.cat((torch.zeros(n_global, dtype=torch.int64), torch.arange(1, n_local + 1)))
    with torch.no_grad():
        plain = model(seen, position_ids=positions.expand(2, -1), attention_mask=torch.ones_like(seen)).logits
        apply_lm_infinite(model, n_local, n_global, block_len=8)
        ours = model(ids).logits
    torch.testing.assert_close(ours[:, -1], plain[:, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", SLOPED)
def test_the_bias_beyond_the_window_is_that_of_distance_l(family):
    """Compare one layer with the dense definition with slopes 2 ** -(8 i / heads), to 1e-10."""
    model, ids, met = small_model(family, num_layers=1), tokens(2, 40), {}
    attention = next(module for module in model.modules() if hasattr(module, "layer_idx"))
    apply_lm_infinite(model, 12, 3, block_len=8)
    output_of = {"mpt": "out_proj"}.get(family, "dense")
    input_of = {"mpt": "Wqkv"}.get(family, "query_key_value")
    getattr(attention, input_of).register_forward_hook(lambda _, args, output: met.update(mixed=output))
    getattr(attention, output_of).register_forward_pre_hook(lambda _, args: met.update(attended=args[0]))
    with torch.no_grad():
        model(ids)
    num_heads = 4 if family == "falcon_alibi" else 6
    width = 48 // num_heads
    if family == "mpt":
        query, key, value = (x.unflatten(-1, (num_heads, width)).transpose(1, 2) for x in met["mixed"].chunk(3, -1))
    else:
        query, key, value = met["mixed"].unflatten(-1, (num_heads, 3, width)).permute(3, 0, 2, 1, 4)
    expected = dense_lambda(query, key, value, 12, 3, Unrotated(), slopes=expected_slopes(family))
    torch.testing.assert_close(
        met["attended"].unflatten(-1, (num_heads, width)).transpose(1, 2), expected, rtol=0, atol=1e-10
    )


def expected_slopes(family: str) -> Tensor:
    """Return the slopes by hand for 4 and 6 heads.

    Beyond 4 heads the ALiBi paper takes every other slope of 8 heads, MPT its second half first. Falcon divides by the
    square root of the head dim.
    """
    if family == "falcon_alibi":
        return 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64) / 12**0.5
    if family == "mpt":
        return 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0, 1.0, 3.0], dtype=torch.float64)
    return 2.0 ** -torch.tensor([2.0, 4.0, 6.0, 8.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_matches_the_row_alone_with_and_without_a_cache(family, side):
    model = small_model(family)
    handle = apply_lm_infinite(model, 8, 3, block_len=5)
    ids, mask = tokens(3, 44), torch.ones(3, 44, dtype=torch.int64)
    for row, length in enumerate((20, 11, 2)):
        start, stop = (0, 20 - length) if side == "left" else (length, 20)
        mask[row, start:stop] = 0
    cache, outputs, seen = handle.new_cache(), [], 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for size in (20, 1, 1, 9, 1, 12):
            piece, seen = ids[:, seen : seen + size], seen + size
            call = {"attention_mask": mask[:, :seen], "past_key_values": cache, "use_cache": True}
            outputs.append(model(piece, **call).logits)
        for row in range(3):
            real = mask[row].bool()
            alone = model(ids[row][real][None]).logits[0]
            torch.testing.assert_close(whole[row][real], alone, rtol=0, atol=1e-6)
            torch.testing.assert_close(torch.cat(outputs, dim=1)[row][real], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_equal_with_a_constant_a_full_and_no_cache(family):
    model, ids = small_model(family), tokens(2, 15)
    handle = apply_lm_infinite(model, 8, 3)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    # MPT's configuration says False.
    full = model.generate(ids, use_cache=True, **settings)
    held = model.generate(ids, use_cache=True, past_key_values=handle.new_cache(), **settings)
    assert torch.equal(held, full)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_model_is_independent(family):
    model, ids = small_model(family), tokens(1, 30)
    apply_lm_infinite(model, 8, 2)
    with torch.no_grad():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids).logits, expected)


@pytest.mark.parametrize("family", ["gptj", "falcon_alibi", "mpt"])
def test_attention_weights_are_refused(family):
    model = small_model(family)
    apply_lm_infinite(model, 8, 2)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 4), output_attentions=True)
