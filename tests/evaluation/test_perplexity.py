"""Perplexity protocols against a naive float64 Llama, and invariance to chunks, batches and modes."""

import math
import weakref

import pytest
import torch
from torch import Tensor

from clex_train.evaluation.perplexity import chunked, evaluating, one_shot
from clex_train.evaluation.scoring_head import token_nll
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table
from tests.evaluation import plain_llama
from tests.evaluation.evaluation_models import build_tiny_llama

L = 16
LENGTHS = (16, 32, 64, 112)


@pytest.fixture
def model():
    return build_tiny_llama().eval()


@pytest.fixture
def table(model) -> FrequencyTable:
    """Make frequencies that change with t in every pair, on a grid finer than the integers."""
    inv_freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    moving = pi_table(inv_freq, scale_grid(8, step=0.5))
    return FrequencyTable(moving.t, ntk_table(inv_freq, moving.t).inv_freq * moving.t[:, None] ** -0.25)


@pytest.fixture
def handle(model, table) -> RotaryHandle:
    installed = install_rotary(model, L)
    installed.use(table)
    return installed


def tokens_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_one_shot_equals_one_plain_forward_at_the_final_t(model, handle, table, length: int) -> None:
    tokens = tokens_of(length)
    spectrum = table.at(math.ceil(2 * length / L) / 2)
    nll = one_shot(model, handle, tokens, chunk_len=10)
    for row, ids in zip(nll, tokens.tolist(), strict=True):
        expected = plain_llama.chunk_nll(model.state_dict(), model.config, ids, [(0, length, spectrum.inv_freq)])
        torch.testing.assert_close(row.double(), expected, rtol=2e-5, atol=2e-5)
        assert float(row.double().mean()) == pytest.approx(float(expected.mean()), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_caching_unrotated_keys_and_rotating_them_at_every_t(model, handle, table, length: int) -> None:
    tokens = tokens_of(length)
    chunks = [(start, start + L, table.at((start + L) / L).inv_freq) for start in range(0, length, L)]
    nll = chunked(model, handle, tokens, chunk_len=1000)
    for row, ids in zip(nll, tokens.tolist(), strict=True):
        expected = plain_llama.chunk_nll(model.state_dict(), model.config, ids, chunks)
        torch.testing.assert_close(row.double(), expected, rtol=2e-5, atol=2e-5)
        assert float(row.double().mean()) == pytest.approx(float(expected.mean()), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("protocol", [one_shot, chunked])
def test_chunks_and_batches_do_not_change_the_numbers(model, handle, protocol) -> None:
    tokens = tokens_of(80, batch=3)
    whole = protocol(model, handle, tokens, 80)
    for chunk_len in (1, 7, 16, 33, 1000):
        torch.testing.assert_close(protocol(model, handle, tokens, chunk_len), whole, rtol=1e-5, atol=1e-5)
    alone = torch.cat([protocol(model, handle, row[None], 80) for row in tokens])
    torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_two_protocols_only_differ_beyond_the_training_length(model, handle) -> None:
    short, long = tokens_of(L), tokens_of(4 * L)
    torch.testing.assert_close(one_shot(model, handle, short, 8), chunked(model, handle, short, 8))
    assert not torch.allclose(one_shot(model, handle, long, 8), chunked(model, handle, long, 8), atol=1e-2)


@torch.no_grad()
def test_logits_exist_for_one_chunk_at_a_time(model, handle) -> None:
    alive: list[weakref.ref[Tensor]] = []
    widths: list[int] = []

    def require_freed_logits(module, args) -> None:
        assert all(logits() is None for logits in alive)

    def record_logits(module, args, out) -> None:
        alive.append(weakref.ref(out))
        widths.append(out.shape[1])

    model.register_forward_pre_hook(require_freed_logits)
    model.lm_head.register_forward_hook(record_logits)
    for protocol in (one_shot, chunked):
        protocol(model, handle, tokens_of(64), 12)
    assert max(widths) == 12
    assert sum(widths) == 2 * 64


@torch.no_grad()
def test_a_window_beyond_the_table_is_refused(model, handle) -> None:
    with pytest.raises(ValueError, match="num_tokens=144"):
        one_shot(model, handle, tokens_of(144), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_nll_equals_cross_entropy_for_every_tile_length(dtype: torch.dtype, monkeypatch) -> None:
    logits = 20 * torch.randn(2, 9, 31, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = logits.to(dtype)
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    monkeypatch.setattr("clex_train.evaluation.scoring_head.LEAST_TOKENS", 1)
    for elements in (1, 2 * 31 * 4, 10**6):
        monkeypatch.setattr("clex_train.evaluation.scoring_head.TILE_ELEMENTS", elements)
        torch.testing.assert_close(token_nll(logits, targets).double().flatten(), expected, rtol=1e-6, atol=1e-5)


def test_evaluating_restores_the_mode_even_after_an_error(model) -> None:
    def fail() -> None:
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    model.train()
    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training
    assert torch.is_grad_enabled()


@torch.no_grad()
def test_gradient_checkpointing_does_not_disable_the_cache(model, handle) -> None:
    tokens = tokens_of(48)
    expected = one_shot(model, handle, tokens, 10)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    with evaluating(model):
        torch.testing.assert_close(one_shot(model, handle, tokens, 10), expected)
