"""Selection of evaluation windows, and fingerprints of the scored tokens."""

import hashlib

import numpy as np
import pytest

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.root import Config
from clex_train.evaluation.windows import WindowSet, select
from clex_train.measures.during_training import warn_of_later
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store

DOCUMENT_LENS = (7, 70, 33, 31, 200, 32, 5, 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Write documents of different lengths with tokens 1000 * document + index."""
    documents = [[1000 * d + i for i in range(n - 1)] for d, n in enumerate(DOCUMENT_LENS)]
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, {"train": [[1, 2]], "validation": documents}, vocab_size=9000)
    return TokenStore(path).split("validation")


def test_every_window_is_inside_one_document_and_none_overlap(store: TokenStore) -> None:
    windows = select(store, longest=32, num_windows=100)
    assert windows.tokens.shape == (sum(n // 32 for n in DOCUMENT_LENS), 32)
    spans = set()
    for row, document, start in zip(windows.tokens, windows.documents, windows.starts, strict=True):
        text = np.append(1000 * document + np.arange(DOCUMENT_LENS[document] - 1), 0)
        np.testing.assert_array_equal(row, text[start : start + 32])
        spans |= {(document, int(start) + i) for i in range(32)}
    assert len(spans) == windows.tokens.size


def test_the_selection_depends_only_on_the_seed(store: TokenStore) -> None:
    first, again = (select(store, 32, 5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.content == again.content
    others = {select(store, 32, 5, seed=s).content for s in range(8)}
    assert len(others) > 1


def test_a_larger_selection_includes_every_smaller_one(store: TokenStore) -> None:
    def selected(count: int) -> set[tuple[int, int]]:
        windows = select(store, 32, count, seed=1)
        return set(zip(windows.documents.tolist(), windows.starts.tolist(), strict=True))

    for count in range(1, 10):
        assert len(selected(count)) == count
        assert selected(count) < selected(count + 1)


def test_every_long_document_has_a_window_before_any_has_two(store: TokenStore) -> None:
    long_enough = [d for d, n in enumerate(DOCUMENT_LENS) if n >= 32]
    for seed in range(5):
        windows = select(store, 32, len(long_enough), seed=seed)
        assert windows.documents.tolist() == long_enough


def test_documents_that_are_too_short_are_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"lengths=256: none of the 8 validation documents .* longest has 200 tokens"):
        select(store, longest=256, num_windows=4)


def test_fewer_windows_than_requested_are_reported(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    select(store, longest=64, num_windows=50)
    assert (
        "num_windows=50: the validation split has only 5 windows of 64 tokens, all are used (5 of 8 documents"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("validation", "lengths", "said"),
    [
        ([[1] * 63], [32, 64], ""),
        (
            [[1] * 62],
            [32, 64],
            "cannot be evaluated as configured: evaluation.lengths=64: none of the 1 valid",
        ),
        ([], [32], "cannot be evaluated as configured: data.path="),
    ],
)
def test_lengths_that_later_evaluations_will_miss_are_reported_early(
    tmp_path, caplog: pytest.LogCaptureFixture, validation: list[list[int]], lengths: list[int], said: str
) -> None:
    write_store(tmp_path / "store", {"train": [[1, 2]], "validation": validation}, vocab_size=9)
    warn_of_later(Config(evaluation=EvaluationConfig(lengths=lengths)), TokenStore(tmp_path / "store"))
    assert said in caplog.text if said else not caplog.text


def scored_except_multiples(stride: int, longest: int = 32) -> np.ndarray:
    """Mark all tokens as scored except the multiples of a stride."""
    return np.arange(longest) % stride != 0


def test_fingerprints_are_equal_exactly_for_equal_scored_tokens(store: TokenStore) -> None:
    windows, again = select(store, 32, 4), select(store, 32, 4)
    other_token = windows.tokens.copy()
    other_token[-1, -1] += 1
    changed = WindowSet(other_token, windows.documents, windows.starts)
    masks = [
        scored_except_multiples(2),
        scored_except_multiples(8),
        scored_except_multiples(32),
        np.arange(32) >= 16,
        np.arange(32) >= 17,
        scored_except_multiples(8) & (np.arange(32) != 9),
    ]
    assert len({windows.fingerprint(mask) for mask in masks}) == len(masks)
    assert [windows.fingerprint(mask) for mask in masks] == [again.fingerprint(mask) for mask in masks]
    assert not {windows.fingerprint(mask) for mask in masks} & {changed.fingerprint(mask) for mask in masks}
    assert windows.content == again.content != changed.content


def test_fingerprints_match_those_of_older_files() -> None:
    tokens = np.arange(64).reshape(2, 32)
    windows = WindowSet(tokens, np.arange(2), np.zeros(2, dtype=np.int64))
    before = hashlib.blake2b(b"(2, 32)/8/" + tokens.astype("<i8").tobytes(), digest_size=8).hexdigest()
    assert windows.fingerprint(scored_except_multiples(8)) == before
