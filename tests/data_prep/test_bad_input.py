"""Bad input of data_prep: one error line with file, line or row and remedy; records are only dropped on request."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from clex_train.token_store.manifest import partial_path
from data_prep.config import CorpusConfig, OnBadRecord
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import Piece
from data_prep.tokenize.encoding import load_tokenizer
from tests.data_prep.small_corpora import COMPRESS, TEXTS, jsonl, stored_texts, tokenize_files, write_jsonl

GOOD = [{"text": "good"}, {"text": "fine"}]

BAD_LINES = [
    ('{"text": "open', r"a.jsonl: line 3: malformed JSON \(Unterminated string starting at column 10\)"),
    ("not json", r"a.jsonl: line 3: malformed JSON \(Expecting value at column 1\)"),
    ('{"text": "a"} {"text": "b"}', r"line 3: malformed JSON \(Extra data at column 15\)"),
    ("[" * 100_000, r"line 3: malformed JSON \(nested too deeply\)"),
    ('["text"]', "line 3: expected a JSON object, found list"),
    ('{"txt": "a", "meta": {}}', "line 3: no field 'text', the record has 'txt', 'meta'"),
    ("{}", "line 3: no field 'text', the record has none"),
    ('{"text": 3}', "line 3: field 'text' must be a string, but is int"),
    ('{"text": null}', "line 3: field 'text' must be a string, but is NoneType"),
    ('{"text": " \\n"}', "line 3: field 'text' is empty"),
    (b'{"text": "caf\xe9"}', r"line 3: not UTF-8 \(byte 14 is 0xe9\); convert"),
    ('{"text": "\\ud83d!"}', "line 3: character 1 of the text is half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_named_and_writes_no_store(
    tmp_path: Path, tokenizer_dir: Path, suffix: str, line: str | bytes, message: str
) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", [*GOOD, line, *GOOD])
    with pytest.raises(ValueError, match=message.replace("a.jsonl", f"a.jsonl{suffix}")) as caught:
        tokenize_files([path], tokenizer_dir, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert "corpus.on_bad_record=skip" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_bad_line_is_numbered_by_its_place_in_the_whole_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD * 100, "{", *GOOD])
    size = path.stat().st_size
    for start in range(0, size, size // 7):
        piece = Piece(str(path), "jsonl", start, size)
        if start <= 200 * len(jsonl(GOOD[:1])):
            with pytest.raises(ValueError, match=r"a\.jsonl: line 201: malformed"):
                list(documents(piece, CorpusConfig(paths=["-"]), Counter()))


def test_bad_records_are_skipped_counted_and_reported_on_request(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [line for line, _ in BAD_LINES]
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD[0], *lines, GOOD[1]])
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", on_bad_record=OnBadRecord.skip)
    assert stored_texts(store) == ["good", "fine"]
    assert store.manifest.sources[0].counts == {"bad_records": len(lines), "documents": 2}
    assert "left out: " in caplog.text
    assert "a.jsonl: line 2: malformed JSON" in caplog.text


def test_records_removed_by_a_filter_are_counted(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "set": "x"}, {"text": "b", "set": "y"}])
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", where={"set": "y"})
    assert stored_texts(store) == ["b"]
    assert store.manifest.sources[0].counts == {"documents": 1, "filtered": 1}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("policy", list(OnBadRecord))
def test_a_truncated_file_stops_the_program_even_if_bad_records_are_skipped(
    tmp_path: Path, tokenizer_dir: Path, suffix: str, policy: OnBadRecord
) -> None:
    content = COMPRESS[suffix](jsonl([{"text": os.urandom(300).hex()} for _ in range(100)]))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content[: len(content) // 2])
    message = rf"a\.jsonl{suffix}: line \d+: (gzip|zstandard|xz|bzip2) stream is truncated.*; fetch the file again"
    with pytest.raises(ValueError, match=message):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", on_bad_record=policy)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_with_a_wrong_suffix_is_named(tmp_path: Path, tokenizer_dir: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(jsonl(GOOD))
    with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}: line 1: .* corrupt"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store")


def test_a_text_file_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\nsecond Ö\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 \(byte 8 of line 2 is 0xd6\)"):
        tokenize_files([tmp_path / "a.txt"], tokenizer_dir, tmp_path / "store")


def test_a_parquet_file_without_the_column_is_refused_with_its_columns(tmp_path: Path, tokenizer_dir: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text', it has content, id; set corpus\.text_field"):
        tokenize_files([tmp_path / "a.parquet"], tokenizer_dir, tmp_path / "store")


def test_a_parquet_row_of_the_wrong_type_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: field 'text' must be a string, but is NoneType"):
        tokenize_files([tmp_path / "a.parquet"], tokenizer_dir, tmp_path / "store")


def test_a_damaged_parquet_file_is_named(tmp_path: Path, tokenizer_dir: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 1000}), tmp_path / "a.parquet")
    os.truncate(tmp_path / "a.parquet", (tmp_path / "a.parquet").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: .*; fetch the file again") as caught:
        tokenize_files([tmp_path / "a.parquet"], tokenizer_dir, tmp_path / "store")
    assert "\n" not in str(caught.value)


def test_a_corpus_whose_records_are_all_removed_is_refused_as_empty(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "set": "x"}])
    with pytest.raises(ValueError, match=r"the corpus is empty, no record became a document \(1 filtered\)"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", where={"set": "y"})


def make_unwritable(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "store"


def test_an_unwritable_output_is_refused_before_reading(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["{"])
    with pytest.raises(ValueError, match=r"output=.*file/store: .*/file is a file, not a folder; name another place"):
        tokenize_files([path], tokenizer_dir, make_unwritable(tmp_path))


def test_a_full_disk_keeps_finished_work_and_is_reported(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    monkeypatch.setattr("clex_train.token_store.writer.os.fsync", full)
    with pytest.raises(ValueError, match=r"output=.*: the disk is full; free some space and run the same command"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store")
    monkeypatch.undo()
    assert stored_texts(tokenize_files([path], tokenizer_dir, tmp_path / "store")) == ["good", "fine"]


def no_eos(folder: Path, tokenizer_dir: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def empty_directory(folder: Path, tokenizer_dir: Path) -> Path:
    (folder / "tokenizer").mkdir()
    return folder / "tokenizer"


def only_weights(folder: Path, tokenizer_dir: Path) -> Path:
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "model" / name).write_text("{}")
    return folder / "model"


def lfs_pointer(folder: Path, tokenizer_dir: Path) -> Path:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    return folder / "tokenizer"


def with_code(folder: Path, tokenizer_dir: Path) -> Path:
    """Write a tokenizer whose code would end the program if it were run."""
    shutil.copytree(tokenizer_dir, folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "tokenizer_class": "XTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "tokenization_x.py").write_text("raise SystemExit('code was run')\n")
    return folder / "tokenizer"


def missing_directory(folder: Path, tokenizer_dir: Path) -> Path:
    return folder / "no" / "such" / "tokenizer"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_eos, "it has no EOS token"),
        (empty_directory, r"no tokenizer in this directory \(no tokenizer.json; it has no files\)"),
        (only_weights, r"it has config.json, model.safetensors\); name a directory .* train_tokenizer"),
        (lfs_pointer, "tokenizer.json is a git-lfs pointer instead of the file; run `git lfs pull`"),
        (
            with_code,
            "it comes with Python code, which does not run unless you allow it; read it, then set "
            "tokenizer.trust_remote_code=true",
        ),
        (missing_directory, "no such directory"),
    ],
)
def test_an_unusable_tokenizer_is_refused_in_one_line(
    tmp_path: Path,
    tokenizer_dir: Path,
    make: Callable[[Path, Path], Path],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("no prompt on the terminal"))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(make(tmp_path, tokenizer_dir)))
    assert "\n" not in str(caught.value)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    content=st.binary(max_size=400), suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet"])
)
def test_random_bytes_give_an_error_or_texts_that_they_contain(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    piece = Piece(str(path), "parquet" if suffix == ".parquet" else suffix.split(".")[1], 0, len(content))
    found, message = [], f"{path}: whole"
    try:
        found = [document.text for document in documents(piece, CorpusConfig(paths=["-"]), Counter())]
    except ValueError as error:
        message = str(error)
    assert all(suffix == ".txt" and text.encode() in content for text in found)
    assert message.startswith(str(path))
    assert "\n" not in message


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "meta", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(records=st.lists(values, max_size=6))
def test_random_json_gives_exactly_its_texts(tmp_path: Path, records: list[object]) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = CorpusConfig(paths=["-"], on_bad_record=OnBadRecord.skip)
    piece = Piece(str(path), "jsonl", 0, path.stat().st_size)
    found = [document.text for document in documents(piece, corpus, Counter())]
    texts = [record.get("text") for record in records if isinstance(record, dict)]
    assert found == [text for text in texts if isinstance(text, str) and text.strip()]


def test_an_error_leaves_no_partially_renamed_store(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": TEXTS[0]}, "{"])
    with pytest.raises(ValueError, match="malformed"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store")
    assert not list(partial_path(tmp_path / "store").rglob("*.t*"))
