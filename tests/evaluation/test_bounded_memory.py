"""Memory options of an evaluation: unchanged results, and the measured bound."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from clex_train.attention.chunked_sdpa import NAME, chunked_attention
from clex_train.evaluation import scoring_head
from clex_train.evaluation.perplexity import chunked, evaluating, one_shot
from clex_train.evaluation.scoring_head import score_chunk, tiled_head, token_nll
from clex_train.rope.patch import install_rotary
from clex_train.rope.preallocated_cache import HostLayer, PreallocatedLayer, new_cache
from clex_train.scaling.methods.ntk import ntk_table
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 12},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.5},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
    "bloom": {},
}


def build(family: str):
    """Build a seeded random model of a family with weights large enough to matter."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens_of(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


def test_transfers_to_and_from_the_host_are_contiguous() -> None:
    layer, states = HostLayer(capacity=9), torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    for new in (states, states[:, :, :1]):
        keys, values = layer.update(new, -new)
    assert torch.equal(keys, torch.cat((states, states[:, :, :1]), dim=2))
    assert torch.equal(values, -keys)
    assert keys.permute(2, 0, 1, 3).is_contiguous()
    assert values.permute(2, 0, 1, 3).is_contiguous()


def test_rows_move_between_pinned_buffers_by_one_selection(monkeypatch) -> None:
    layer, states, asked, looked = HostLayer(capacity=9), torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5), [], []
    layer.update(states, -states)
    pinned, empty, order = {buffer.data_ptr() for buffer in layer._buffers}, torch.empty, torch.tensor([1, 1, 0])
    # As on a machine with a GPU, a selection from a pinned buffer is not pinned itself.
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.data_ptr() in pinned)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: asked.append(pin_memory) or empty(*a, **k))
    layer._map_rows(lambda x: looked.append(x) or x[order])
    assert asked == [True, True]
    assert len(looked) == 2
    assert torch.equal(layer.keys, states[order])
    assert torch.equal(layer.values, -states[order])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_host", [False, True])
def test_chunks_through_a_growing_cache_equal_one_forward(monkeypatch, family: str, on_host: bool) -> None:
    monkeypatch.setattr(scoring_head, "TILE_ELEMENTS", 5 * VOCAB)
    monkeypatch.setattr(scoring_head, "LEAST_TOKENS", 1)
    model, tokens = build(family), tokens_of(40)
    with torch.no_grad():
        expected = token_nll(model(input_ids=tokens, use_cache=False).logits[:, :-1], tokens[:, 1:])
    found = torch.empty_like(expected)
    cache = new_cache(model, 40, on_host)
    with evaluating(model), chunked_attention(model), tiled_head(model, CPU):
        for first, last in ((0, 17), (17, 18), (18, 40)):
            targets = tokens[:, first + 1 : last + 1]
            inputs = {"input_ids": tokens[:, first:last], "past_key_values": cache, "use_cache": True}
            found[:, first : first + targets.shape[1]] = score_chunk(model, targets, **inputs)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert family in ("mistral", "gemma2") or all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)
    assert "forward" not in model.get_output_embeddings().__dict__
    assert model.config._attn_implementation != NAME


def test_the_protocols_give_the_same_results_in_bounded_memory(monkeypatch) -> None:
    monkeypatch.setattr(scoring_head, "TILE_ELEMENTS", 5 * VOCAB)
    monkeypatch.setattr(scoring_head, "LEAST_TOKENS", 1)
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    handle.use(ntk_table(handle.base_inv_freq, torch.arange(1, 9, dtype=torch.float64)))
    tokens = tokens_of(6 * CONTEXT_LEN)
    for read in (one_shot, chunked):
        with evaluating(model), monkeypatch.context() as stock:
            # The stock cache, masks and logits of the model.
            stock.setattr("clex_train.evaluation.perplexity.new_cache", lambda model, *_: _stock_cache(model))
            expected = read(model, handle, tokens, 10)
        for on_host in (False, True):
            with evaluating(model), chunked_attention(model), tiled_head(model, CPU):
                found = read(model, handle, tokens, 10, cache_on_host=on_host)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def _stock_cache(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def test_keys_are_rerotated_in_place_tile_by_tile(monkeypatch) -> None:
    monkeypatch.setattr("clex_train.rope.key_cache.TILE_LEN", 7)
    model = build_tiny_llama().eval()
    handle = install_rotary(model, CONTEXT_LEN)
    handle.use(ntk_table(handle.base_inv_freq, torch.arange(1, 9, dtype=torch.float64)))
    tokens, caches = tokens_of(60), [_stock_cache(model), new_cache(model, 60), new_cache(model, 60, on_host=True)]
    with torch.no_grad():
        for cache in caches:
            for first, last in ((0, 16), (16, 40), (40, 60)):
                model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True)
    buffers = [layer._buffers[0].data_ptr() for layer in caches[1].layers]
    for stock, *ours in zip(*(cache.layers for cache in caches), strict=True):
        for layer in ours:
            torch.testing.assert_close(layer.keys, stock.keys)
    assert buffers == [layer.keys.data_ptr() for layer in caches[1].layers]
    assert all(isinstance(layer, HostLayer) for layer in caches[2].layers)


def test_a_full_cache_raises_an_error() -> None:
    layer = PreallocatedLayer(4)
    states = torch.zeros(1, 2, 3, 8)
    layer.update(states, states)
    with pytest.raises(ValueError, match="num_tokens=6: the cache was allocated for 4 tokens"):
        layer.update(states, states)


def test_models_that_postprocess_logits_are_not_tiled() -> None:
    for family, tiled in (("llama", True), ("gpt_neox", True), ("gemma2", False), ("granite", False)):
        model = build(family)
        with evaluating(model), tiled_head(model, CPU):
            assert (scoring_head.SCORER in model.__dict__) is tiled
            tokens = tokens_of(5)
            assert model(input_ids=tokens).logits.shape == (2, 5, VOCAB)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs the resident set from /proc")
def test_an_evaluation_takes_little_more_than_weights_cache_tile_and_chunk(tmp_path: Path) -> None:
    from bench_eval import Shape, measure

    found = measure(tmp_path, Shape(layers=8, key_heads=4), length=16384, chunk_len=512, protocol="one_shot")
    assert found.ratio < 1.2, found
    assert found.ratio > 0.9, "something was not measured"
