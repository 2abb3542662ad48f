"""Back ends of LM-Infinite: agreement with the dense definition, selection and refusals.

flex_attention is compared uncompiled, with the same masks and score_mod; tests marked `gpu` compile it. flash-attn is
replaced by a function with its documented semantics; tests marked `gpu` call the real one.
"""

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from clex_train.attention.partial_softmax import SoftmaxRule, attend
from clex_train.lm_infinite.back_ends import (
    BACK_ENDS,
    BackEndChoice,
    CallFacts,
    FlashAttention,
    FlexAttention,
    fused_block_len,
)
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.lm_infinite.lambda_attention import Scheme, lambda_attention
from clex_train.lm_infinite.local_window import attend_window
from clex_train.lm_infinite.stream import KeyValues, Place, Stream
from tests.lm_infinite.dense_lambda import PlainRotation, Unrotated, dense_lambda
from tests.rope.rotary_families import tiny_model, tokens

WIDTH = 16


def normal(*shape: int, seed: int = 0, **how: object) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(**how) if how else values


def slopes_of(num_heads: int) -> Tensor:
    return 2.0 ** -torch.arange(1, num_heads + 1, dtype=torch.float64)


@pytest.fixture
def uncompiled(monkeypatch) -> FlexAttention:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return FlexAttention(kernel=flex.flex_attention)


@pytest.fixture
def documented_flash(monkeypatch) -> FlashAttention:
    """Build a module `flash_attn` whose function follows the documentation of flash-attn, [B, S, H, D] in and out."""

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs):
        assert causal
        assert return_attn_probs
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * softmax_scale
        scores = scores if softcap == 0 else softcap * torch.tanh(scores / softcap)
        behind = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * behind.abs()
        scores = scores.masked_fill((behind < 0) | (behind > window_size[0]), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1), None

    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return FlashAttention()


# queries, keys, L, heads, key heads
WINDOWS = [(9, 9, 16, 2, 2), (9, 9, 4, 2, 2), (12, 19, 8, 4, 2), (5, 30, 26, 4, 1)]
RULES = {
    "plain": lambda heads: SoftmaxRule(0.3),
    "capped": lambda heads: SoftmaxRule(0.7, softcap=1.5),
    "alibi": lambda heads: SoftmaxRule(0.3, slopes=slopes_of(heads)),
}


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_computes_the_window_with_its_log_sum_exp(case, rule, padded, uncompiled):
    num_queries, num_keys, n_local, heads, key_heads = case
    query = normal(2, heads, num_queries, WIDTH)
    window = KeyValues(normal(2, key_heads, num_keys, WIDTH, seed=1), normal(2, key_heads, num_keys, WIDTH, seed=2))
    place = Place(num_keys - num_queries, 100, 100 - num_keys + num_queries)
    padding = torch.tensor([0, place.first_key + 3]) if padded else None
    arguments = (query, window, place, padding, n_local, RULES[rule](heads))
    ours, expected = uncompiled.attend(*arguments), attend_window(*arguments)
    sees = torch.ones(2, num_queries, dtype=torch.bool)
    if padding is not None:
        sees = torch.arange(place.first_query, place.first_query + num_queries) >= padding[:, None]
    rows = sees[:, None].expand(-1, heads, -1)
    torch.testing.assert_close(ours.output[rows], expected.output[rows], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.log_sum_exp[rows], expected.log_sum_exp[rows], rtol=0, atol=1e-10)
    assert ours.log_sum_exp.isfinite().all()


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_flash_attn_is_called_for_the_window_with_its_log_sum_exp(case, rule, documented_flash):
    num_queries, num_keys, n_local, heads, key_heads = case
    query = normal(2, heads, num_queries, WIDTH)
    window = KeyValues(normal(2, key_heads, num_keys, WIDTH, seed=1), normal(2, key_heads, num_keys, WIDTH, seed=2))
    place = Place(num_keys - num_queries, 0, 0)
    arguments = (query, window, place, None, n_local, RULES[rule](heads))
    for ours, expected in zip(documented_flash.attend(*arguments), attend_window(*arguments), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7 if rule == "alibi" else 1e-10)


@pytest.mark.parametrize("name", ["flex", "flash"])
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_blocks_of_a_fused_back_end_join_to_the_dense_definition(name, positions, uncompiled, documented_flash):
    n, n_local, n_global, heads = 70, 8, 3, 4
    query, keys, values = (normal(2, h, n, WIDTH, seed=h) for h in (heads, 2, 2))
    rotation = PlainRotation(WIDTH) if positions == "rotary" else Unrotated()
    slopes = None if positions == "rotary" else slopes_of(heads)
    back_end = {"flex": uncompiled, "flash": documented_flash}[name]
    scheme = Scheme(n_local, rotation, SoftmaxRule(WIDTH**-0.5, slopes=slopes), 16, back_end=back_end)
    start = KeyValues(keys[:, :, :n_global], values[:, :, :n_global])
    output = lambda_attention(query, KeyValues(keys, values), start, Stream(n), scheme)
    expected = dense_lambda(query, keys, values, n_local, n_global, rotation, slopes=slopes)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-7 if slopes is not None else 1e-10)


def test_a_fused_block_is_two_windows_of_whole_tiles():
    assert [fused_block_len(n_local) for n_local in (16, 600, 2048)] == [1024, 1280, 4096]


class TestChoice:
    """Selection of the back end."""

    def facts(self, num_tokens: int = 100, device: str = "cpu", **how: object) -> CallFacts:
        query = torch.empty(1, 2, num_tokens, 64, device=device, **how)
        return CallFacts(query, query, SoftmaxRule(1.0), has_padding=False, wants_gradient=False)

    def test_a_cpu_uses_blocked_sdpa_and_logs_the_reasons_once(self, caplog):
        model = tiny_model("llama")
        apply_lm_infinite(model, 16, 4)
        with caplog.at_level(logging.INFO), torch.no_grad():
            model(tokens(1, 80))
            model(tokens(1, 90))
        said = [record.getMessage() for record in caplog.records if "lm_infinite uses" in record.getMessage()]
        assert len(said) == 1
        assert said[0].startswith("lm_infinite uses sdpa (flash_attention: flash-attn is not installed")
        assert "flex_attention: its kernels need a GPU" in said[0]

    def test_decoding_always_uses_explicit_matrices(self):
        assert BackEndChoice("flex_attention").select(self.facts(num_tokens=1)) is BACK_ENDS["sdpa"]

    @pytest.mark.parametrize("name", ["flex_attention", "flash_attention"])
    def test_an_unsuitable_back_end_is_refused_by_name(self, name):
        model = tiny_model("llama")
        apply_lm_infinite(model, 16, 4, back_end=name)
        with torch.no_grad(), pytest.raises(ValueError, match=f"back_end={name}: .*; use back_end=auto"):
            model(tokens(1, 80))

    def test_an_unknown_back_end_is_refused_with_the_known_ones(self):
        model = tiny_model("llama")
        with pytest.raises(ValueError, match="back_end=cudnn: one of auto, flash_attention, flex_attention, sdpa"):
            apply_lm_infinite(model, 16, 4, back_end="cudnn")
        apply_lm_infinite(model, 16, 4).undo()

    def test_a_gpu_uses_flash_attn_in_half_precision_and_flex_attention_otherwise(self, monkeypatch):
        """Fake devices and packages by name; compute nothing."""
        monkeypatch.setattr("clex_train.lm_infinite.back_ends.is_flash_attn_2_available", lambda: True)
        monkeypatch.setattr("clex_train.lm_infinite.back_ends.find_spec", lambda name: name)

        class OnGpu(Tensor):
            device = torch.device("cuda")

        def facts(dtype: torch.dtype, rule: SoftmaxRule | None = None, **how: bool) -> CallFacts:
            query = torch.empty(1, 2, 100, 64, dtype=dtype).as_subclass(OnGpu)
            flags = {"has_padding": False, "wants_gradient": False, **how}
            return CallFacts(query, query, rule or SoftmaxRule(1.0), **flags)

        choose = BackEndChoice("auto").select
        assert choose(facts(torch.bfloat16)) is BACK_ENDS["flash_attention"]
        assert choose(facts(torch.bfloat16, has_padding=True)) is BACK_ENDS["flex_attention"]
        assert choose(facts(torch.bfloat16, wants_gradient=True)) is BACK_ENDS["flex_attention"]
        assert choose(facts(torch.float32)) is BACK_ENDS["flex_attention"]
        assert choose(facts(torch.float64)) is BACK_ENDS["sdpa"]
        assert choose(facts(torch.bfloat16, SoftmaxRule(1.0, dropout=0.1))) is BACK_ENDS["sdpa"]


class TestBfloat16:
    """bfloat16 on a CPU: inputs, weights and output have eight bits of mantissa, 0.4 % of a value."""

    @pytest.mark.parametrize("positions", ["rotary", "alibi"])
    @pytest.mark.parametrize("with_gradients", [False, True])
    def test_blocks_are_within_2_percent_of_the_dense_definition(self, positions, with_gradients):
        n, n_local, n_global, heads = 300, 80, 4, 4
        rotation = PlainRotation(WIDTH) if positions == "rotary" else Unrotated()
        slopes = None if positions == "rotary" else slopes_of(heads)
        rounded = [normal(1, h, n, WIDTH, seed=h, dtype=torch.bfloat16) for h in (heads, 2, 2)]
        leaves = [x.clone().requires_grad_(with_gradients) for x in rounded]
        scheme = Scheme(n_local, rotation, SoftmaxRule(WIDTH**-0.5, slopes=slopes), 64)
        start = KeyValues(*(x[:, :, :n_global] for x in leaves[1:]))
        output = lambda_attention(leaves[0], KeyValues(*leaves[1:]), start, Stream(n), scheme)
        exact = [x.double().requires_grad_(with_gradients) for x in rounded]
        expected = dense_lambda(*exact, n_local, n_global, rotation, slopes=slopes)
        assert output.dtype is torch.bfloat16
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.02)
        if with_gradients:
            output.sum().backward()
            expected.sum().backward()
            for ours, reference in zip(leaves, exact, strict=True):
                error = (ours.grad.double() - reference.grad).norm() / reference.grad.norm()
                assert error < 0.02

    def test_a_model_reads_chunks_like_one_forward(self):
        model, ids = tiny_model("llama", dtype=torch.bfloat16), tokens(1, 120)
        handle = apply_lm_infinite(model, 32, 4)
        cache = handle.new_cache()
        with torch.no_grad():
            whole = model(ids).logits.float()
            pieces = [model(p, past_key_values=cache, use_cache=True).logits.float() for p in ids.split(25, dim=1)]
        error = (torch.cat(pieces, dim=1) - whole).norm() / whole.norm()
        assert error < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnGpu:
    """Compiled kernels on a GPU against the dense definition in float64 on the CPU."""

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
    @pytest.mark.parametrize("positions", ["rotary", "alibi"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_flex_attention_forward_and_backward(self, dtype, tolerance, positions, padded):
        self.check("flex_attention", dtype, tolerance, positions, padded, with_gradients=True)

    @pytest.mark.parametrize("positions", ["rotary", "alibi"])
    def test_flash_attn_forward(self, positions):
        pytest.importorskip("flash_attn")
        self.check("flash_attention", torch.bfloat16, 3e-2, positions, padded=False, with_gradients=False)

    def test_scores_of_bfloat16_are_not_rounded(self):
        query, keys, values = (
            3 * normal(2, h, n, 64, seed=n, dtype=torch.bfloat16) for h, n in ((4, 1), (2, 99), (2, 99))
        )
        rule = SoftmaxRule(64**-0.5)
        with torch.no_grad():
            found = attend(query.cuda(), keys.cuda(), values.cuda(), None, rule)
        exact = attend(query.double(), keys.double(), values.double(), None, rule)
        torch.testing.assert_close(found.log_sum_exp.double().cpu(), exact.log_sum_exp, rtol=0, atol=1e-4)

    def check(self, name, dtype, tolerance, positions, padded, with_gradients):
        n, n_local, n_global, heads, width = 700, 100, 4, 4, 64
        rotation = OnAnyDevice(width) if positions == "rotary" else Unrotated()
        slopes = None if positions == "rotary" else slopes_of(heads)
        padding = torch.tensor([0, 333]) if padded else None
        valid = None if padding is None else torch.arange(n) >= padding[:, None]
        rounded = [normal(2, h, n, width, seed=h + i, dtype=dtype) for i, h in enumerate((heads, 2, 2))]
        leaves = [x.cuda().requires_grad_(with_gradients) for x in rounded]
        first = torch.zeros(2, dtype=torch.int64) if padding is None else padding
        index = (first[:, None] + torch.arange(n_global))[:, None, :, None].cuda()
        start = KeyValues(*(x.take_along_dim(index, dim=2) for x in leaves[1:]))
        rule = SoftmaxRule(width**-0.5, slopes=None if slopes is None else slopes.cuda())
        scheme = Scheme(n_local, rotation, rule, 256, back_end=BACK_ENDS[name])
        stream = Stream(n, None if padding is None else padding.cuda())
        output = lambda_attention(leaves[0], KeyValues(*leaves[1:]), start, stream, scheme)
        exact = [x.double().requires_grad_(with_gradients) for x in rounded]
        expected = dense_lambda(*exact, n_local, n_global, rotation, valid, slopes=slopes)
        real = 1.0 if valid is None else valid[:, None, :, None].double()
        torch.testing.assert_close(output.double().cpu() * real, expected * real, rtol=0, atol=tolerance)
        if not with_gradients:
            return
        (output.double() * (real if isinstance(real, float) else real.cuda())).sum().backward()
        (expected * real).sum().backward()
        for ours, reference in zip(leaves, exact, strict=True):
            assert (ours.grad.double().cpu() - reference.grad).norm() < tolerance * reference.grad.norm()

    def test_a_model_matches_its_results_on_a_cpu(self):
        model, ids = tiny_model("llama", hidden_size=128), tokens(2, 300)
        apply_lm_infinite(model, 64, 4)
        with torch.no_grad():
            on_cpu = model(ids).logits
            on_gpu = model.cuda()(ids.cuda()).logits.cpu()
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-2)


class OnAnyDevice(PlainRotation):
    """Move frequencies and positions to the device of the rotated tensor."""

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        self.inv_freq = self.inv_freq.to(x.device)
        return super().at(x, positions.to(x.device))
