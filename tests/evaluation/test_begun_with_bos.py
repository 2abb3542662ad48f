"""BOS in windows, streams and prompts of an evaluation: tokens read, tokens scored, and the choice."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from clex_train.config.bos import Bos
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.data.bos import evaluation_bos_id, warn_if_bos_differs
from clex_train.evaluation import runner
from clex_train.evaluation.methods import tables
from clex_train.evaluation.perplexity import evaluating
from clex_train.evaluation.protocols import readings
from clex_train.evaluation.streaming import plan_stream, streamed, windowed
from clex_train.evaluation.windows import select
from clex_train.retrieval.prompts import encode
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from clex_train.token_store.manifest import MANIFEST
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama, random_windows

BOS, LENGTHS = 5, [16, 32, 64]
PROTOCOLS = [protocol for protocol in Protocol if protocol not in (Protocol.streaming, Protocol.long_ppl)]


def evaluate(windows, chunk_len=1000):
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    chosen = tables((Method.none,), base_rope(handle), max(LENGTHS))
    todo = readings(EvaluationConfig(lengths=LENGTHS, protocols=PROTOCOLS, stride=8), CONTEXT_LEN)
    return runner.evaluate(model, handle, chosen, windows, todo, chunk_len=chunk_len, device=torch.device("cpu"))


def test_every_span_is_read_after_bos_and_the_same_tokens_are_scored() -> None:
    """Compare with plain forwards over each span with BOS in place of its first token."""
    plain, begun = random_windows(3, 64), replace(random_windows(3, 64), bos_id=BOS)
    with_bos, without = evaluate(begun, chunk_len=20), evaluate(plain)
    model = build_tiny_llama()
    todo = readings(EvaluationConfig(lengths=LENGTHS, protocols=[Protocol.one_shot, Protocol.sliding], stride=8), 16)
    for reading in todo:
        for length in LENGTHS:
            expected = np.zeros(plain.tokens.shape)
            for span in reading.spans[length]:
                tokens = torch.from_numpy(plain.tokens[:, span.start : span.stop].copy())
                tokens[:, 0] = BOS
                with torch.no_grad():
                    log = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
                nll = -log.gather(2, tokens[:, 1:, None])[..., 0].numpy()
                expected[:, span.first : span.stop] = nll[:, span.first - span.start - 1 :]
            (found,) = [s for s in with_bos.scores if (s.protocol, s.length) == (reading.protocol.value, length)]
            np.testing.assert_allclose(found.window_nll, expected[:, reading.scored].sum(axis=1), rtol=1e-4)
    for ours, others in zip(with_bos.scores, without.scores, strict=True):
        assert (ours.protocol, ours.length, ours.num_tokens) == (others.protocol, others.length, others.num_tokens)
        assert ours.fingerprint != others.fingerprint, "numbers with BOS and without do not mix"
        assert ours.window_nll != others.window_nll
    assert (with_bos.windows["bos_id"], "bos_id" in without.windows) == (BOS, False)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in (100, 90, 80)]
    write_store(tmp_path / "store", {"train": [[1, 2]], "validation": documents}, vocab_size=VOCAB)
    return TokenStore(tmp_path / "store").split("validation")


def with_record(store: TokenStore, has_bos: bool | None, bos_id: int | None = BOS) -> TokenStore:
    tokenizer = replace(store.manifest.tokenizer, bos_id=bos_id)
    text = replace(store.manifest, bos=has_bos, tokenizer=tokenizer).to_json()
    (store.path / MANIFEST).write_text(text)
    return TokenStore(store.path, "validation")


def test_bos_does_not_change_the_selected_windows(store: TokenStore) -> None:
    plain, begun = select(store, 32, 5, seed=3), select(store, 32, 5, seed=3, bos_id=BOS)
    assert (plain.tokens == begun.tokens).all()
    assert (plain.starts == begun.starts).all()
    assert plain.content != begun.content
    assert plain.starts.max() > 0, "some begin in the middle of a document"
    for window in range(len(begun.tokens)):
        assert begun.span(window, 0, 32).tolist() == [BOS, *plain.tokens[window, 1:]]
        assert begun.span(window, 16, 32).tolist() == [BOS, *plain.tokens[window, 17:]]


def tokenizer_that(adds: bool) -> object:
    """Make a tokenizer with only the attributes that the check reads."""

    class Tokenizer:
        bos_token_id, eos_token_id = BOS, 2

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": self.encode(text)}

        def encode(self, text: str, verbose: bool = True) -> list[int]:
            return [*([BOS] if adds else []), *map(ord, text), 2]

    return Tokenizer()


@pytest.mark.parametrize(
    ("choice", "record", "adds", "expected"),
    [
        (Bos.auto, True, False, BOS),
        (Bos.auto, False, True, None),
        (Bos.auto, None, True, BOS),
        (Bos.auto, None, False, None),
        (Bos.always, False, False, BOS),
        (Bos.never, True, True, None),
    ],
)
def test_auto_follows_the_store_or_without_a_record_the_tokenizer(
    store: TokenStore, choice: Bos, record: bool | None, adds: bool, expected: int | None
) -> None:
    assert evaluation_bos_id(choice, with_record(store, record), tokenizer_that(adds)) == expected


def test_a_model_trained_on_a_store_without_a_record_is_evaluated_without_bos(store: TokenStore) -> None:
    old = with_record(store, None)
    assert evaluation_bos_id(Bos.auto, old) is None
    assert evaluation_bos_id(Bos.always, old) == BOS
    assert evaluation_bos_id(Bos.auto, with_record(store, True)) == BOS


def test_only_always_refuses_a_tokenizer_without_bos(store: TokenStore) -> None:
    without = with_record(store, None, bos_id=None)
    assert evaluation_bos_id(Bos.auto, without, SimpleNamespace()) is None
    assert evaluation_bos_id(Bos.never, without, SimpleNamespace()) is None
    with pytest.raises(ValueError, match=r"^evaluation\.bos=always: .* has no BOS token"):
        evaluation_bos_id(Bos.always, without, SimpleNamespace())


@pytest.mark.parametrize("adds", [True, False])
def test_prompts_begin_with_at_most_one_bos(adds: bool) -> None:
    tokenizer = tokenizer_that(adds)
    assert encode(tokenizer, "ab", bos=True) == [BOS, 97, 98]
    assert encode(tokenizer, "ab", bos=False) == [97, 98]
    assert encode(tokenizer, "ab") == ([BOS] if adds else []) + [97, 98]


def test_a_stream_and_each_of_its_windows_begin_with_bos(store: TokenStore) -> None:
    model, bar = build_tiny_llama().double().eval(), tqdm(disable=True)
    stream = plan_stream(store, 10 * CONTEXT_LEN, CONTEXT_LEN, BOS)
    tokens = torch.from_numpy(store.tokens(0, stream.num_tokens).astype("int64"))
    windows = tokens.view(-1, CONTEXT_LEN).clone()
    windows[:, 0] = BOS
    tokens[0] = BOS
    with evaluating(model):
        found = torch.cat(list(windowed(model, stream, 64, bar))).view(-1, CONTEXT_LEN)
        log = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
        torch.testing.assert_close(
            found[:, 1:].double(), -log.gather(2, windows[:, 1:, None])[..., 0], rtol=1e-5, atol=0
        )
        found = torch.cat(list(streamed(model, None, stream, 64, bar)))
        log = model(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(found[1:].double(), -log.gather(1, tokens[1:, None])[:, 0], rtol=1e-5, atol=0)
    assert stream.describe()["fingerprint"] != replace(stream, bos_id=None).describe()["fingerprint"]


def test_windows_that_differ_from_training_documents_are_reported(
    store: TokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_bos_differs(with_record(store, True), BOS)
    warn_if_bos_differs(with_record(store, False), None)
    assert not caplog.records
    warn_if_bos_differs(with_record(store, True), None)
    assert "evaluation begins windows and prompts without BOS" in caplog.text
    assert "set evaluation.bos=always to match them" in caplog.text
    warn_if_bos_differs(with_record(store, None), BOS, "bos")
    assert "have no BOS (the store predates the BOS option); set bos=never to match them" in caplog.text
