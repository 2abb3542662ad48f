"""The verb `inspect`: counts, lengths and samples of a store, damage, and a closed output pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.concat_packing import ConcatRows
from clex_train.data.sampler import ShuffledRows
from clex_train.token_store import store as stores
from clex_train.token_store.manifest import Source
from clex_train.token_store.shard_files import TokenFile
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from clex_train.utils.errors import InputError
from data_prep import inspect, statistics
from data_prep.config import InspectVerb
from data_prep.statistics import collect, domain_names
from tests.data_prep.small_corpora import TEXTS, tokenize_files, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path) -> TokenStore:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    return tokenize_files([path], tokenizer_dir, tmp_path / "store")


def report_of(store: Path, capsys: pytest.CaptureFixture[str], **keys: object) -> str:
    inspect.run(InspectVerb(store=str(store), **keys))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_report_has_counts_lengths_and_decoded_samples(
    store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(store.path, capsys, samples=5, sample_tokens=10_000, verify=True)
    assert f"5 documents, {store.num_tokens:,} tokens, 1 shards" in report
    assert store.fingerprint in report
    assert all(repr(text + "</s>") in report for text in TEXTS)
    assert "a.jsonl: record 3" in report
    assert "files verified" in report


def test_the_histogram_counts_every_document_and_token_once(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"train": [[1] * n for n in (0, 1, 2, 3, 6, 7, 100)]}, vocab_size=10)
    *lines, longest = inspect.length_histogram(collect(TokenStore(tmp_path / "store")))
    rows = [line.split()[:4] for line in lines]
    found = {int(row[0]): (int(row[1]), int(row[3])) for row in rows}
    assert {power: count for power, (count, _) in found.items() if count} == {1: 1, 2: 2, 4: 2, 8: 1, 64: 1}
    assert sum(tokens for _, tokens in found.values()) == sum(n + 1 for n in (0, 1, 2, 3, 6, 7, 100))
    assert longest.split() == ["longest:", "101", "tokens"]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40), chunk=st.integers(1, 9))
def test_the_sums_equal_those_of_plain_python_for_every_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk: int
) -> None:
    path = tmp_path_factory.mktemp("s") / "store"
    write_store(path, {"train": [[1] * n for n in lengths]}, vocab_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "CHUNK_DOCUMENTS", chunk)
        found = collect(TokenStore(path))
    sizes = [n + 1 for n in lengths]
    for power in range(statistics.NUM_CLASSES):
        inside = [size for size in sizes if 1 << power <= size < 2 << power]
        assert (found.documents[power], found.tokens[power]) == (len(inside), sum(inside))
    assert found.source_tokens.tolist() == [sum(sizes)]
    assert found.longest == max(sizes)


def test_domains_are_the_folders_of_the_files_with_their_shares_of_tokens(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, count in (("book", 3), ("arxiv/2020", 1), ("arxiv/2021", 1)):
        write_jsonl(tmp_path / "raw" / folder / "a.jsonl", [{"text": f"{folder} {i} {TEXTS[0]}"} for i in range(count)])
    store = tokenize_files([tmp_path / "raw"], tokenizer_dir, tmp_path / "store")
    tokens = {"book": 0, "arxiv": 0}
    for doc_id, start, stop in store.documents():
        tokens["book" if "/book/" in store.origin(doc_id) else "arxiv"] += stop - start
    report = report_of(store.path, capsys).splitlines()
    for name, documents in (("book", 3), ("arxiv", 2)):
        (line,) = [line.split() for line in report if line.split()[:1] == [name]]
        share = f"{100 * tokens[name] / store.num_tokens:.2f}"
        assert line[1:] == [str(documents), "documents", f"{tokens[name]:,}", "tokens", share, "%"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/book/a.jsonl"], ["book"]),
        (["/data/book/a.jsonl", "/data/book/b.jsonl"], ["book", "book"]),
        (["/data/book/a.jsonl", "/data/arxiv/x/b.jsonl", "/data/c.jsonl"], ["book", "arxiv", "data"]),
        (["a.jsonl", "book/b.jsonl"], [".", "book"]),
    ],
)
def test_a_domain_is_named_by_the_first_folder_that_differs(paths: list[str], names: list[str]) -> None:
    sources = [Source(path, 0, 1, None) for path in paths]
    assert domain_names(sources) == names
    hub = Source("allenai/c4", 0, 1, None, is_part=True)
    assert domain_names([hub, *sources]) == ["allenai/c4", *names]


def test_the_shown_rows_are_those_of_a_run_with_marked_document_boundaries(
    store: TokenStore, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    report = report_of(store.path, capsys, samples=0, rows=3, seq_len=40, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    order = ShuffledRows(ConcatRows(store, 40), 5)
    shown = report[report.index("rows as training reads them") :].splitlines()
    texts = [line.strip() for line in shown if line.startswith("    ") and "---" not in line]
    expected = []
    for row in (order[i] for i in range(3)):
        segments = range(row.segments[-1] + 1)
        expected += [repr(tokenizer.decode(row.tokens[row.segments == segment].tolist())) for segment in segments]
    assert texts == expected
    assert len(texts) > 3, "some row joins several documents"
    assert sum("--- document" in line for line in shown) == len(texts)


def test_padding_is_shown_as_padding(store: TokenStore, capsys: pytest.CaptureFixture[str]) -> None:
    from clex_train.config.data import Packing

    report = report_of(store.path, capsys, rows=1, seq_len=store.num_tokens + 7, packing=Packing.concat)
    assert f"fewer than seq_len={store.num_tokens + 7}" in report
    report = report_of(store.path, capsys, rows=9, seq_len=100, packing=Packing.best_fit)
    assert "--- padding, " in report


@pytest.mark.parametrize("file", ["train/00000.tokens", "train/00000.documents", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_is_found_first_and_its_file_named(
    store: TokenStore, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = np.fromfile(store.path / file, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(store.path / file)
    with pytest.raises(InputError, match=f"{file}: damaged"):
        inspect.run(InspectVerb(store=str(store.path), verify=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("field", "value"), [("stop", 0), ("stop", 1 << 50), ("source", 7), ("source", -1)])
def test_a_damaged_table_is_named_even_without_verifying_checksums(store: TokenStore, field: str, value: int) -> None:
    from clex_train.token_store.manifest import DOCUMENT

    file = store.path / "train" / "00000.documents"
    table = np.fromfile(file, DOCUMENT)
    table[field][-1] = value
    table.tofile(file)
    with pytest.raises(InputError, match=r"train/00000.documents: damaged"):
        inspect.run(InspectVerb(store=str(store.path)))


def test_a_text_in_both_splits_is_reported_with_both_places(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use `split_field`, which splits by origin, so that one text of many origins is in both splits."""
    records = [{"text": TEXTS[0], "from": str(i)} for i in range(20)] + [{"text": TEXTS[1], "from": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    store = tokenize_files([path], tokenizer_dir, tmp_path / "s", split_field="from", validation_share=0.5)
    held_out = store.split("validation")
    report = report_of(store.path, capsys)
    (line,) = [line for line in report.splitlines() if "are also training documents" in line]
    count = sum(held_out.tokens(start, start + 5).tolist() == store.tokens(0, 5).tolist()
                for _, start, _ in held_out.documents())  # fmt: skip
    assert line.startswith(f"{count} of {held_out.num_documents} validation documents are also training documents")
    assert line.count("a.jsonl: record") == 2
    apart = tokenize_files([path], tokenizer_dir, tmp_path / "apart", validation_share=0.5)
    if apart.num_documents and TokenStore(apart.path, "validation").num_documents:
        assert "no text is in both splits" in report_of(apart.path, capsys)


def test_the_tokens_of_shards_are_not_read_for_counts(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tokens(store: TokenStore, shard: int) -> TokenFile:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(stores.TokenStore, "_open_tokens", no_tokens)
    inspect.run(InspectVerb(store=str(store.path), samples=0, rows=0))


def test_the_plot_is_an_image(store: TokenStore, tmp_path: Path) -> None:
    from matplotlib import image

    inspect.run(InspectVerb(store=str(store.path), samples=0, rows=0, plot=str(tmp_path / "deep" / "lengths.png")))
    picture = image.imread(tmp_path / "deep" / "lengths.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05


def test_a_closed_output_pipe_ends_the_report_without_a_traceback(store: TokenStore) -> None:
    command = [sys.executable, "-m", "data_prep", "inspect", f"store={store.path}", "samples=5", "rows=1"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_missing_store_argument_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="store: name the directory of a token store"):
        inspect.run(InspectVerb())
    with pytest.raises(ValueError, match=r"^store=.*nowhere: no such directory"):
        inspect.run(InspectVerb(store=str(tmp_path / "nowhere")))


def test_escape_sequences_in_a_store_are_printed_as_text(store: TokenStore, capsys) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["sources"][0]["path"] = "/texts/\x1b]0;title\x07/a.txt"
    manifest["sources"][0]["counts"] = {"\x1b[2J": 1}
    manifest["split_rule"]["value"] = "\x1b[31m\u202e"
    manifest["settings"]["evaluation_set"] = {"\x9bkey": "\x1b[8m"}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    inspect.run(InspectVerb(store=str(store.path), samples=2, rows=1))
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(printed)
    assert r"\x1b[2J" in printed
    assert r"\x1b[31m\u202e" in printed
