"""Packed rows with a document mask compute the same as each document alone, in every attention implementation."""

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from clex_train.attention.document_mask import cumulative_lengths, document_mask_kwargs, single_document_kwargs
from clex_train.config.attention import AttentionImplementation
from clex_train.data.position_sampling import draw_document_batch
from clex_train.models.memory_options import recompute_layers
from clex_train.rope.patch import install_rotary
from clex_train.scaling.spectrum import Spectrum
from tests.attention import varlen
from tests.rope.rotary_families import TRANSFORMERS, tiny_model, tokens

LAYOUTS = ([5, 1, 10], [1, 1, 14], [16], [9, 7])
"""Document lengths in the four rows of a batch: some of one token, one that fills its row, no two rows cut alike."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "a window of 4": ("mistral", {"sliding_window": 4}),
    "windows in one layer of two": ("gemma2", {"sliding_window": 4}),
    "windows in the upper layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "two rotary embeddings": ("gemma3_text", {"sliding_window": 4}),
    "partial rotary": ("gpt_neox", {}),
    "experts": ("mixtral", {}),
    "a fused projection": ("phi3", {}),
}
IMPLEMENTATIONS = {
    "eager": AttentionImplementation.eager,
    "sdpa": AttentionImplementation.sdpa,
    varlen.NAME: AttentionImplementation.flash_attention_2,
}
TOLERANCE = 1e-5
WEIGHTS = torch.linspace(-1, 1, 61)
"""Weights of the sum over logits whose gradient is compared."""


def model_of(case: str, back_end: str) -> Any:
    family, settings = FAMILIES[case]
    # gemma2 does not declare support for sdpa.
    if family == "gemma2" and back_end == "sdpa":
        pytest.skip("transformers offers no sdpa for gemma2")
    model = tiny_model(family, **settings)
    model.set_attn_implementation(back_end)
    return model


def positions_of(layouts: Any = LAYOUTS) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in layouts])


def packed(model: Any, ids: Tensor, back_end: str, layouts: Any = LAYOUTS) -> Tensor:
    implementation = IMPLEMENTATIONS.get(back_end, AttentionImplementation.flex_attention)
    arguments = document_mask_kwargs(positions_of(layouts), implementation, ids.device)
    return model(input_ids=ids, use_cache=False, **arguments).logits


def alone(model: Any, ids: Tensor, layouts: Any = LAYOUTS) -> Tensor:
    """Compute the logits of every document alone, placed as in the packed row."""
    model.set_attn_implementation("eager")
    rows = []
    for row, lengths in zip(ids, layouts, strict=True):
        rows.append(torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in row.split(lengths)]))
    return torch.stack(rows)


@pytest.mark.parametrize("back_end", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", FAMILIES)
def test_logits_and_gradients_match_those_of_each_document_alone(case: str, back_end: str) -> None:
    model, ids = model_of(case, back_end), tokens(4, 16)
    results = []
    for logits in (packed(model, ids, back_end), alone(model, ids)):
        model.zero_grad()
        (logits * WEIGHTS).sum().backward()
        results.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (logits, gradients), (expected, expected_gradients) = results
    assert (logits - expected).abs().max() < TOLERANCE
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= TOLERANCE * max(1.0, float(gradient.abs().max())), name


def test_logits_change_without_document_boundaries() -> None:
    """Prove that the comparison above can fail."""
    model, ids = model_of("llama", "sdpa"), tokens(4, 16)
    with torch.no_grad():
        assert (model(input_ids=ids, use_cache=False).logits - alone(model, ids)).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", ["llama", "a window of 4"])
def test_flex_attention_isolates_documents(case: str) -> None:
    # It has no backward pass on a CPU, and takes a minute to compile.
    model, ids = model_of(case, "flex_attention"), tokens(4, 16)
    with torch.no_grad():
        assert (packed(model, ids, "flex_attention") - alone(model, ids)).abs().max() < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("back_end", ["flex_attention", "flash_attention_2"])
def test_documents_are_isolated_on_a_gpu(back_end: str) -> None:
    if back_end == "flash_attention_2":
        pytest.importorskip("flash_attn")
    ids = tokens(4, 16).cuda()
    model = tiny_model("llama", hidden_size=128, dtype=torch.bfloat16).cuda()
    model.set_attn_implementation(back_end)
    arguments = document_mask_kwargs(positions_of(), AttentionImplementation(back_end), ids.device)
    with torch.no_grad():
        got = model(input_ids=ids, use_cache=False, **arguments).logits.float()
        wrong = model(input_ids=ids, use_cache=False).logits.float()
        expected = alone(model, ids).float()
    assert (got - expected).abs().max() < 0.1 * (wrong - expected).abs().max()


@pytest.mark.parametrize("back_end", IMPLEMENTATIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sampled_positions_change_the_rotation_but_not_the_mask(back_end: str, checkpointing: bool) -> None:
    model, ids = model_of("llama", back_end).train(), tokens(4, 16)
    if checkpointing:
        recompute_layers(model)
    handle = install_rotary(model, 16)
    sampled = draw_document_batch("random", [3, 4, 5, 6], LAYOUTS, context_len=16, t=2.5, seed=1)
    results = []
    for apart in (True, False):
        leaf = handle.base_inv_freq.requires_grad_()
        if apart:
            with handle.training(Spectrum(leaf, t=2.5), sampled):
                logits = packed(model, ids, back_end)
                (logits * WEIGHTS).sum().backward()
        else:
            model.set_attn_implementation("eager")
            for row, lengths, positions in zip(ids, LAYOUTS, sampled, strict=True):
                for document, at in zip(row.split(lengths), positions.split(lengths), strict=True):
                    with handle.training(Spectrum(leaf, t=2.5), at[None]):
                        (model(input_ids=document[None], use_cache=False).logits * WEIGHTS).sum().backward()
        results.append(leaf.grad)
    assert results[1].abs().min() > 1e-4
    # The gradient of the frequencies sums over layers, heads and tokens in another order, in float32.
    assert (results[0] - results[1]).abs().max() < 1e-4 * results[1].abs().max()


def test_cumulative_lengths_lay_the_rows_end_to_end() -> None:
    assert cumulative_lengths(positions_of()).tolist() == [0, 5, 6, 16, 17, 18, 32, 48, 57, 64]


@pytest.mark.skipif(Version("5.19") > TRANSFORMERS, reason="these versions of transformers look whatever they are told")
@pytest.mark.parametrize("case", ["llama", "a window of 4", "partial rotary", "experts"])
def test_flash_attention_skips_the_packing_check_for_a_row_of_one_document(case: str, monkeypatch: Any) -> None:
    model = model_of(case, varlen.NAME)
    ids = tokens(1, 16)
    monkeypatch.setattr(varlen.utils, "_is_packed_sequence", lambda *_: pytest.fail("a wait for the GPU in each layer"))
    arguments = single_document_kwargs(ids, AttentionImplementation.flash_attention_2, ids.device)
    found = model(input_ids=ids, use_cache=False, **arguments).logits
    torch.testing.assert_close(found, alone(model, ids, [[16]]), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "back_end"), [(2, "flash_attention_2"), (1, "sdpa")])
def test_single_document_arguments_are_empty_without_a_packing_check(rows: int, back_end: str) -> None:
    ids = torch.zeros(rows, 16, dtype=torch.int64)
    assert single_document_kwargs(ids, AttentionImplementation(back_end), ids.device) == {}
