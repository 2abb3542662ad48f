"""Which tokens are scored."""

import numpy as np
import pytest

from clex_train.data.store import TokenStore
from clex_train.data.writer import write_store
from clex_train.evaluation.windows import WindowSet, score_stride, select
from clex_train.settings.evaluation import Protocol

DOCUMENT_LENS = (7, 70, 33, 31, 200, 32, 5, 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of different lengths whose tokens tell document and place: 1000 * document + index."""
    documents = [[1000 * d + i for i in range(n - 1)] for d, n in enumerate(DOCUMENT_LENS)]
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, {"train": [[1, 2]], "validation": documents}, vocab_size=9000)
    return TokenStore(path).split("validation")


def test_every_window_lies_inside_one_document_and_none_overlap(store: TokenStore) -> None:
    windows = select(store, longest=32, num_windows=100, stride=8)
    assert windows.tokens.shape == (sum(n // 32 for n in DOCUMENT_LENS), 32)
    spans = set()
    for row, document, start in zip(windows.tokens, windows.documents, windows.starts, strict=True):
        text = np.append(1000 * document + np.arange(DOCUMENT_LENS[document] - 1), 0)
        np.testing.assert_array_equal(row, text[start : start + 32])
        spans |= {(document, int(start) + i) for i in range(32)}
    assert len(spans) == windows.tokens.size


def test_the_choice_is_a_function_of_the_seed_alone(store: TokenStore) -> None:
    first, again = (select(store, 32, 5, 8, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint
    others = {select(store, 32, 5, 8, seed=s).fingerprint for s in range(8)}
    assert len(others) > 1


def test_more_windows_keep_those_of_fewer(store: TokenStore) -> None:
    def chosen(count: int) -> set[tuple[int, int]]:
        windows = select(store, 32, count, 8, seed=1)
        return set(zip(windows.documents.tolist(), windows.starts.tolist(), strict=True))

    for count in range(1, 10):
        assert len(chosen(count)) == count
        assert chosen(count) < chosen(count + 1)


def test_every_long_document_gives_a_window_before_any_gives_two(store: TokenStore) -> None:
    long_enough = [d for d, n in enumerate(DOCUMENT_LENS) if n >= 32]
    for seed in range(5):
        windows = select(store, 32, len(long_enough), 8, seed=seed)
        assert windows.documents.tolist() == long_enough


def test_the_same_tokens_are_scored_at_every_length(store: TokenStore) -> None:
    windows = select(store, longest=64, num_windows=3, stride=8)
    for length in (8, 16, 32, 64):
        pieces = windows.pieces(length)
        np.testing.assert_array_equal(pieces.reshape(windows.tokens.shape), windows.tokens)
        first_of_a_piece = np.arange(windows.longest) % length == 0
        assert not (first_of_a_piece & windows.scored).any()
    assert windows.scored.sum() == 64 - 8


def test_too_short_documents_are_one_clear_error(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"lengths=256: none of the 8 validation documents .* longest has 200 tokens"):
        select(store, longest=256, num_windows=4, stride=8)


def test_fewer_windows_than_asked_are_told(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    select(store, longest=64, num_windows=50, stride=8)
    assert "num_windows=50: the validation split holds 5 windows of 64 tokens" in caplog.text


def test_the_fingerprint_covers_tokens_and_stride(store: TokenStore) -> None:
    windows = select(store, 32, 4, stride=8)
    other_stride = WindowSet(windows.tokens, windows.documents, windows.starts, 4)
    other_token = windows.tokens.copy()
    other_token[-1, -1] += 1
    changed = WindowSet(other_token, windows.documents, windows.starts, 8)
    assert len({windows.fingerprint, other_stride.fingerprint, changed.fingerprint}) == 3


def test_chunked_never_scores_a_chunks_first_token() -> None:
    assert score_stride([64, 128], context_len=64, protocols=[Protocol.one_shot]) == 64
    assert score_stride([64, 128], context_len=24, protocols=[Protocol.one_shot]) == 64
    assert score_stride([64, 128], context_len=24, protocols=[Protocol.one_shot, Protocol.chunked]) == 8
    with pytest.raises(ValueError, match="no common divisor"):
        score_stride([64, 128], context_len=27, protocols=[Protocol.chunked])
