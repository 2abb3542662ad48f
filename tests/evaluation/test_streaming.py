"""Streaming evaluation under LM-Infinite: equal to one forward over the stream, in a cache of constant size."""

import sys
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from clex_train.evaluation.perplexity import evaluating
from clex_train.evaluation.streaming import evaluate, plan_stream, segment_sums, streamed, windowed
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama

BAR = tqdm(disable=True)
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (100, 3, 80)]
    path: Path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, {"train": [[1, 2]], "validation": documents}, vocab_size=VOCAB)
    return TokenStore(path).split("validation")


@pytest.mark.parametrize("chunk_len", [1, 7, 16, 64, 1000])
def test_a_stream_has_the_nll_of_one_forward_over_the_whole_stream(store: TokenStore, chunk_len: int) -> None:
    model, stream = build_tiny_llama().double().eval(), plan_stream(store, NUM_TOKENS, CONTEXT_LEN)
    lm_infinite = apply_lm_infinite(model, n_local=12, n_global=3)
    tokens = stream.read(0, NUM_TOKENS)
    with evaluating(model):
        nll = torch.cat(list(streamed(model, lm_infinite.new_cache(), stream, chunk_len, BAR)))
        whole = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
    expected = -whole[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert nll[0] == 0
    torch.testing.assert_close(nll[1:].double(), expected, rtol=1e-6, atol=1e-6)


def test_windows_are_scored_like_separate_texts(store: TokenStore) -> None:
    model, stream = build_tiny_llama().double().eval(), plan_stream(store, NUM_TOKENS, CONTEXT_LEN)
    with evaluating(model):
        nll = torch.cat(list(windowed(model, stream, 3 * CONTEXT_LEN, BAR)))
        for first in range(0, NUM_TOKENS, CONTEXT_LEN):
            tokens = stream.read(first, first + CONTEXT_LEN)
            loss = model(input_ids=tokens, labels=tokens).loss
            assert float(nll[first + 1 : first + CONTEXT_LEN].double().mean()) == pytest.approx(float(loss), rel=1e-6)


def test_streams_and_windows_skip_the_first_token_of_a_window(store: TokenStore) -> None:
    stream = plan_stream(store, NUM_TOKENS, CONTEXT_LEN)
    parts = [torch.ones(50), torch.ones(NUM_TOKENS - 50)]
    sums = segment_sums(iter(parts), stream)
    assert sums == [CONTEXT_LEN - 1.0] * (NUM_TOKENS // CONTEXT_LEN)
    assert stream.scored_per_segment == CONTEXT_LEN - 1


def test_the_curve_has_a_bounded_number_of_points(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["clex_train.evaluation.streaming"], "MOST_SEGMENTS", 3)
    stream = plan_stream(store, NUM_TOKENS, CONTEXT_LEN)
    assert (stream.segment_len, stream.num_tokens) == (4 * CONTEXT_LEN, 128)


@pytest.mark.parametrize("num_tokens", [CONTEXT_LEN - 1, 10**6])
def test_a_stream_longer_than_the_store_is_refused(store: TokenStore, num_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"stream_tokens={num_tokens}: .* has 186 validation tokens"):
        plan_stream(store, num_tokens, CONTEXT_LEN)


def test_a_stream_whose_numbers_overflow_is_named(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    model, stream = build_tiny_llama().eval(), plan_stream(store, NUM_TOKENS, CONTEXT_LEN)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    evaluate(model, stream, ["none"], {}, chunk_len=16)
    keys = [f"perplexity/none/windows/{CONTEXT_LEN}", f"perplexity/none/streaming/{NUM_TOKENS}"]
    assert [line.split(":")[0] for line in caplog.messages] == keys
