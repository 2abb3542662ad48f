"""Per-token log-scaling: against a slow reference that counts masks, under caches, padding, packing and back ends."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clex_train.attention import ulysses
from clex_train.attention.chunked_sdpa import chunked_attention
from clex_train.attention.log_scaling import install_log_scaling
from clex_train.attention.token_scaling import PREFIX, TokenScaling, token_factors
from clex_train.attention.ulysses import UlyssesAttention
from clex_train.models.memory_options import recompute_layers
from clex_train.rope.native import install_native
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils.errors import ConfigError
from tests.attention import varlen
from tests.attention.counted_keys import counted_keys
from tests.rope.rotary_families import CONTEXT, REFUSED, VOCABULARY, from_config, tiny_config, tiny_model, tokens

LENGTHS = (40, 23, 5)
"""Tokens of the rows of a padded batch: two beyond L = 16, one within."""
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([24, 1, 15], [20, 20])])
"""Of packed rows, with documents of up to 24 tokens."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "partial rotary": ("gpt_neox", {}),
    "norm of queries": ("qwen3", {}),
    "windows above L": ("mistral", {"sliding_window": 20}),
    "windows below L": ("mistral", {"sliding_window": 8}),
    "windows in one layer of two": ("gemma3_text", {"sliding_window": 20}),
    # Without experts, whose grouped product has no float64.
    "latent attention": ("deepseek_v3", {"first_k_dense_replace": 2}),
}


def model_of(case: str) -> Any:
    family, settings = MODELS[case]
    return tiny_model(family, **settings).double()


def install(model: Any, policy: str = "token_eval", context_len: int = CONTEXT) -> tuple[RotaryHandle, TokenScaling]:
    handle = install_rotary(model, CONTEXT)
    scaling = install_log_scaling(model, policy, context_len, handle.on_length, handle.on_call)
    assert isinstance(scaling, TokenScaling)
    return handle, scaling


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask of a batch of the rows of `LENGTHS`."""
    ids, mask = tokens(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, -length:] = 1
    mask = mask if side == "left" else mask.flip(1)
    return ids * mask, mask


def calls(kind: str) -> dict[str, Tensor]:
    """Return the arguments of a call without a cache."""
    if kind == "rows":
        return {"input_ids": tokens(2, 40)}
    if kind == "packed":
        return {"input_ids": tokens(2, 40), "position_ids": POSITIONS}
    ids, mask = padded(kind)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["rows", "left", "right", "packed"])
@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_every_query_has_the_factor_of_the_keys_that_its_mask_shows(case: str, kind: str) -> None:
    model, call = model_of(case), calls(kind)
    # L = 6 below a window of 8, so that every layer has factors above 1.
    context_len = 6 if case == "windows below L" else CONTEXT
    handle = install_rotary(model, CONTEXT)
    plain = model(**call, use_cache=False).logits
    scaling = install_log_scaling(model, "token_eval", context_len, handle.on_length, handle.on_call)
    found = model(**call, use_cache=False).logits
    scaling.undo()
    with counted_keys(model, context_len):
        expected = model(**call, use_cache=False).logits
    valid = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    assert (found - expected)[valid].abs().max() < 1e-6
    assert (found - plain)[valid].abs().max() > 1e-3
    assert torch.equal(model(**call, use_cache=False).logits, plain), "undone"


def test_the_factor_is_one_up_to_l_and_logarithmic_beyond() -> None:
    n = torch.tensor([[0, 1, 15, 16, 17, 256]])
    assert token_factors(n, CONTEXT).tolist() == [[1, 1, 1, 1, pytest.approx(math.log(17) / math.log(16)), 2]]


@torch.no_grad()
def test_within_l_nothing_is_multiplied() -> None:
    model, ids = tiny_model("llama"), tokens(2, CONTEXT)
    handle = install_rotary(model, CONTEXT)
    plain = model(ids).logits
    install_log_scaling(model, "token", CONTEXT, handle.on_length, handle.on_call)
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_chunks_and_single_tokens_equal_one_forward_in_a_padded_batch(case: str) -> None:
    model = model_of(case)
    install(model)
    ids, mask = padded("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found, cache, end = [], None, 0
    for piece in ids.split([10, 9, 1, 1, 15, 1, 1, 2], dim=1):
        start, end = end, end + piece.shape[1]
        call = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        output = model(input_ids=piece, past_key_values=cache, use_cache=True, **call)
        cache = output.past_key_values
        found.append(output.logits)
    assert (torch.cat(found, dim=1) - whole)[mask.bool()].abs().max() < 1e-10
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, -length:], use_cache=False).logits
        assert (whole[row, -length:] - alone[0]).abs().max() < 1e-6


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_from_a_padded_batch_equals_each_row_alone(use_cache: bool) -> None:
    model = tiny_model("llama", num_layers=1).double()
    handle, _ = install(model)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    ids, mask = padded("left")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    with handle.pinned(4.0):
        together = model.generate(ids, attention_mask=mask, **options)
        for row, length in enumerate(LENGTHS):
            alone = model.generate(ids[row : row + 1, -length:], **options)
            assert torch.equal(together[row, -length - 8 :], alone[0])


@torch.no_grad()
def test_a_pinned_length_sets_t_and_not_the_factors() -> None:
    model, ids = tiny_model("llama").double(), tokens(1, 40)
    handle, _ = install(model)
    handle.use(ntk_table(handle.base_inv_freq, scale_grid(4.0)))
    whole = model(ids).logits
    with handle.fixed(40):
        output = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=output.past_key_values).logits
    assert (torch.cat((output.logits, rest), dim=1) - whole).abs().max() < 1e-10


@pytest.mark.parametrize(
    "back_end", ["eager", pytest.param("flex_attention", marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
@torch.no_grad()
def test_every_back_end_scales_alike(back_end: str) -> None:
    model, call = tiny_model("llama", hidden_size=64, head_dim=16), calls("left")
    install(model)
    expected = model(**call).logits
    model.set_attn_implementation(back_end)
    valid = call["attention_mask"].bool()
    assert torch.allclose(model(**call).logits[valid], expected[valid], atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_in_chunks_scales_alike_and_keeps_its_mask_omitted() -> None:
    model, ids = tiny_model("llama"), tokens(1, 60)
    install(model)
    whole = model(ids).logits
    with chunked_attention(model):
        first = model(ids[:, :20], use_cache=True)
        rest = model(ids[:, 20:], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat((first.logits, rest), dim=1), whole, atol=1e-5, rtol=0)


def gradients(model: Any, **call: Any) -> list[Tensor]:
    loss = (model(**call, use_cache=False).logits * torch.linspace(-1, 1, VOCABULARY)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_the_slow_reference(recomputed: bool) -> None:
    model, call = model_of("norm of queries").train(), calls("packed")
    with counted_keys(model, CONTEXT):
        expected = gradients(model, **call)
    if recomputed:
        recompute_layers(model)
    install(model, "token")
    for found, wanted in zip(gradients(model, **call), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-6 * (1 + wanted.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", varlen.NAME])
def test_ulysses_scales_the_queries_of_each_document(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(function: Any) -> Any:
        """Build the all-to-all of a group of one rank."""
        return lambda *args, **options: (function(*args, **options)[0].flatten(2), None)

    monkeypatch.setitem(ulysses.DOCUMENT_ATTENTION, varlen.NAME, UlyssesAttention._attend_varlen)
    model, call = tiny_model("llama").train(), calls("packed")
    install(model, "token")
    expected = gradients(model, **call)
    model.set_attn_implementation(attention)
    with UlyssesAttention(model, alone).active(POSITIONS):
        for found, wanted in zip(gradients(model, **call), expected, strict=True):
            assert (found - wanted).abs().max() < 1e-4 * (1 + wanted.abs().max())


@pytest.mark.parametrize(("policy", "applies"), [("token", True), ("token_eval", False)])
def test_a_training_row_counts_its_tokens_and_not_the_positions_sampled_for_them(policy: str, applies: bool) -> None:
    model, ids = tiny_model("llama").train(), tokens(1, 2 * CONTEXT)
    handle = install_rotary(model, CONTEXT)
    sampled = 4.0 * torch.arange(2 * CONTEXT).double()[None]
    spectrum = Spectrum(handle.base_inv_freq, 8.0)

    def logits() -> Tensor:
        with handle.training(spectrum, sampled), torch.no_grad():
            return model(ids, use_cache=False).logits

    plain = logits()
    with counted_keys(model, CONTEXT):
        expected = logits() if applies else plain
    install_log_scaling(model, policy, CONTEXT, handle.on_length, handle.on_call)
    assert torch.allclose(logits(), expected, atol=1e-5, rtol=0)
    # The second half of the row alone exceeds L, so the first is that of the plain model.
    assert torch.equal(logits()[:, :CONTEXT], plain[:, :CONTEXT])


@torch.no_grad()
def test_a_bfloat16_query_is_rounded_once() -> None:
    model, ids = tiny_model("llama", dtype=torch.bfloat16), tokens(1, 40)
    seen: list[Tensor] = []
    install(model)
    (layer, *_) = (module for module in model.modules() if hasattr(module, "token_log_scaling"))
    original = layer.token_log_scaling.scale
    layer.token_log_scaling.scale = lambda query: seen.extend([query, original(query)]) or seen[-1]
    model(ids)
    query, scaled = seen
    factors = [max(1.0, math.log(n) / math.log(CONTEXT)) for n in range(1, 41)]
    expected = (query.double() * torch.tensor(factors, dtype=torch.float64)[None, None, :, None]).bfloat16()
    assert scaled.dtype is torch.bfloat16
    assert torch.equal(scaled, expected)


def test_an_error_within_a_layer_leaves_the_attention_function_in_place() -> None:
    model, ids = tiny_model("llama"), tokens(1, 40)
    install(model)
    model.model.layers[0].self_attn.k_proj.forward = lambda hidden: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(ids)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_undo_removes_every_trace() -> None:
    model = tiny_model("llama")
    before = [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    handle, scaling = install(model)
    model(tokens(1, 40))
    scaling.undo()
    handle.undo()
    assert [(set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert not model.config._attn_implementation.startswith(PREFIX)


def test_attention_that_cannot_be_scaled_by_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type=falcon does not read its softmax scale"):
        install(tiny_model("falcon"))
    kind, settings, _ = REFUSED["Llama 4"]
    handle = install_native(from_config(tiny_config(kind, settings)), CONTEXT)
    with pytest.raises(ConfigError, match=r"model_type=llama4_text attends in chunks, .*use eval, always or off"):
        install_log_scaling(handle.model, "token", CONTEXT, handle.on_length, handle.on_call)
    learned = install_native(from_config(tiny_config("gpt2", {"n_head": 4, "n_embd": 48, "n_layer": 1})), CONTEXT)
    with pytest.raises(ConfigError):
        install_log_scaling(learned.model, "token", CONTEXT, learned.on_length, learned.on_call)


def test_attention_outside_the_interface_is_refused_when_installed_or_when_called() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    original = type(attention)

    class OwnAttention(original):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, **call: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    attention.__class__ = OwnAttention
    handle = install_rotary(model, CONTEXT)
    with pytest.raises(ConfigError, match="model_type=llama is not reached through transformers' attention interface"):
        install_log_scaling(model, "token", CONTEXT, handle.on_length, handle.on_call)
    attention.__class__ = original
    install_log_scaling(model, "token", CONTEXT, handle.on_length, handle.on_call)
    attention.forward = OwnAttention.forward.__get__(attention)
    with pytest.raises(RuntimeError, match="LlamaAttention attends without its attention function"):
        model(tokens(1, 40))
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_counted_is_refused() -> None:
    model = tiny_model("llama")
    handle = install_rotary(model, CONTEXT)
    with pytest.raises(ValueError, match="log_scale=token: counts the keys of each token, so pass on_call"):
        install_log_scaling(model, "token", CONTEXT, handle.on_length)
    install_log_scaling(model, "token", CONTEXT, handle.on_length, handle.on_call)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask of 4 tokens: cached and new ones are 40"):
        model(tokens(1, 40), attention_mask=torch.ones(1, 4, dtype=torch.int64))
