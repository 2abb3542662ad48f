"""Skipped files of a corpus are reported, and unused columns or fields never exclude a text."""

import datetime
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clex_train.token_store.manifest import partial_path
from data_prep import export
from data_prep.config import CorpusConfig, CorpusVerb, Format, OnBadRecord
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import expand, plan
from tests.data_prep.small_corpora import stored_texts, tokenize_files, write_jsonl

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


def test_every_compression_and_suffix_of_json_lines_is_read(tmp_path: Path, tokenizer_dir: Path) -> None:
    names = ["a.jsonl", "b.jsonl.xz", "c.jsonl.bz2", "d.jsonl.zstd", "e.jsonlines", "F.JSONL.GZ", "G.Txt"]
    for name in names[:-1]:
        write_jsonl(tmp_path / "corpus" / name, [{"text": name}])
    (tmp_path / "corpus" / "G.Txt").write_text("G.Txt")
    store = tokenize_files([tmp_path / "corpus"], tokenizer_dir, tmp_path / "store")
    assert sorted(stored_texts(store)) == sorted(names)


def test_one_line_names_every_file_of_a_folder_that_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jsonl", "b.csv", "c.csv", "d.csv", "LICENSE", ".git/x.txt", ".hidden.txt", "README.md", "e.zip.GZ"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    found = expand([str(tmp_path / "corpus")], Format.auto)
    assert [path.name for path in found] == ["a.jsonl"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "1 files read, 10 left out: 3 .csv (b.csv, c.csv, ...), 2 hidden (.git/, .hidden.txt)" in line
    for kind in (
        "broken link (broken.txt)",
        "link to a folder, name it in corpus.paths to read it (linked)",
        ".zip.gz (e.zip.GZ)",
    ):
        assert f"1 {kind}" in line


def test_an_unreadable_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "secret").mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    expand([str(tmp_path)], Format.auto)
    assert "1 unreadable folder (secret)" in caplog.text


def test_a_glob_reports_matches_that_are_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "more" / "b.jsonl", [{"text": "b"}])
    assert len(expand([f"{tmp_path}/*"], Format.auto)) == 1
    assert f"left out 1 matches that are not files: {tmp_path}/more" in caplog.text
    with pytest.raises(ValueError, match=r"matches only folders, such as .*more; end it with /\*\*"):
        expand([f"{tmp_path}/m*"], Format.auto)


def test_a_folder_without_texts_is_refused_with_its_contents(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"no file of a known format in this directory; it has 1 \.csv \(a\.csv\)"):
        plan(CorpusConfig(paths=[str(tmp_path)]), 1000)


@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl", "parquet", "jsonl.gz"])
def test_a_git_lfs_pointer_is_refused_early_or_counted(tmp_path: Path, tokenizer_dir: Path, suffix: str) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}])
    pointer = tmp_path / f"b.{suffix}"
    pointer.write_text(POINTER)
    with pytest.raises(ValueError, match=rf"b\.{suffix}: a git-lfs pointer .* `git lfs pull`"):
        tokenize_files([good, pointer], tokenizer_dir, tmp_path / "store")
    assert not partial_path(tmp_path / "store").exists()
    skipped = tokenize_files([good, pointer], tokenizer_dir, tmp_path / "store", on_bad_record=OnBadRecord.skip)
    assert stored_texts(skipped) == ["good"]
    assert skipped.manifest.sources[1].counts == {"bad_records": 1}


def dates(folder: Path) -> Path:
    """Write columns of dates before the year 1 and of long durations that no Python object can represent."""
    columns = {
        "text": ["one", "two"],
        "meta": pyarrow.array([-800000, 10], pyarrow.date32()),
        "took": pyarrow.array([1 << 62, 1], pyarrow.duration("s")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_an_unused_column_does_not_exclude_a_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = tokenize_files([dates(tmp_path)], tokenizer_dir, tmp_path / "store")
    assert stored_texts(store) == ["one", "two"]


@pytest.mark.parametrize("needed", [{"where": {"meta": str(datetime.date(1970, 1, 11))}}, {"split_field": "meta"}])
def test_a_bad_value_of_a_needed_column_names_row_and_column_and_can_be_skipped(
    tmp_path: Path, tokenizer_dir: Path, needed: dict[str, object]
) -> None:
    path = dates(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1: column 'meta' has a value that cannot be read"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", **needed)
    skipped = tokenize_files([path], tokenizer_dir, tmp_path / "store", **needed, on_bad_record=OnBadRecord.skip)
    assert stored_texts(skipped) == ["two"]


def test_the_corpus_verb_names_the_row_whose_meta_cannot_be_read(tmp_path: Path) -> None:
    corpus = CorpusConfig(paths=[str(dates(tmp_path))])
    with pytest.raises(ValueError, match="row 1: column 'meta'"):
        export.run(CorpusVerb(corpus=corpus, output=str(tmp_path / "out.jsonl")))


@pytest.mark.parametrize("meta", [b"1" * 5000, b'"\xff"', b'"\\ud800"', b"NaN", b"1e999"])
def test_an_unused_field_does_not_make_a_record_bad(tmp_path: Path, meta: bytes) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [b'{"meta": ' + meta + b', "text": "good"}'])
    corpus = CorpusConfig(paths=[str(path)])
    (piece,) = plan(corpus, 1000)[0].pieces
    assert [document.text for document in documents(piece, corpus, Counter())] == ["good"]


def test_a_nested_column_is_read_without_its_neighbours(tmp_path: Path) -> None:
    neighbours = pyarrow.array([{"lang": "en", "when": -800000}], pyarrow.struct({"lang": "string", "when": "date32"}))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "meta": neighbours}), tmp_path / "a.parquet")
    corpus = CorpusConfig(paths=[str(tmp_path / "a.parquet")], where={"meta.lang": "en"})
    (piece,) = plan(corpus, 1000)[0].pieces
    assert [document.text for document in documents(piece, corpus, Counter())] == ["a"]


def write_parquet(path: Path, records: list[dict[str, object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_a_wrong_text_column_is_refused_by_key_and_the_corrected_command_works(
    tmp_path: Path, tokenizer_dir: Path, write
) -> None:
    path = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", [{"content": "a", "id": 1}])
    with pytest.raises(ValueError, match=r"it has content, id|has 'content', 'id'") as refused:
        tokenize_files([path], tokenizer_dir, tmp_path / "store")
    assert "set corpus.text_field=NAME, one of these" in str(refused.value)
    assert not partial_path(tmp_path / "store").exists()
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", text_field="content")
    assert stored_texts(store) == ["a"]


def test_a_program_killed_before_any_shard_does_not_block_another(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "a"}])
    partial = partial_path(tmp_path / "store")
    (partial / "units").mkdir(parents=True)
    (partial / "request.json").write_text(json.dumps({"corpus": {"text_field": "text"}}))
    assert stored_texts(tokenize_files([path], tokenizer_dir, tmp_path / "store", text_field="content")) == ["a"]


@pytest.mark.parametrize("field", ["messages", "conversations"])
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("named", [False, True])
def test_chat_data_is_recognised_and_named(tmp_path: Path, tokenizer_dir: Path, field: str, write, named: bool) -> None:
    chat = [{field: [{"role": "user", "content": "hello"}]}]
    path = write(tmp_path / f"a.{'jsonl' if write is write_jsonl else 'parquet'}", chat)
    with pytest.raises(ValueError, match=f"'{field}' looks like chat data: `python -m data_prep chat` reads"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", **({"text_field": field} if named else {}))
