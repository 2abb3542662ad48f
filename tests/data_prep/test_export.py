"""Export of a corpus as JSON lines, which reads back as the same corpus."""

import json
from pathlib import Path

import pytest

from data_prep import export
from data_prep.config import CorpusConfig, CorpusVerb
from data_prep.corpus.streams import open_stream
from tests.data_prep.small_corpora import TEXTS, files_of, tokenize_files, write_jsonl


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_text_files_become_lines_with_their_origin(tmp_path: Path, suffix: str) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    output = tmp_path / f"out{suffix}"
    export.run(CorpusVerb(corpus=CorpusConfig(paths=[str(tmp_path)]), output=str(output)))
    with open_stream(output) as (content, _):
        records = [json.loads(line) for line in content]
    assert [record["text"] for record in records] == TEXTS
    assert [record["meta"] for record in records] == [{"path": str(tmp_path / f"{i}.txt")} for i in range(len(TEXTS))]
    assert not list(tmp_path.glob("*.partial"))


def test_writing_twice_needs_overwrite_and_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "meta": {"n": 1}} for text in TEXTS])
    for suffix in (".gz", ".zst"):
        verb = CorpusVerb(corpus=CorpusConfig(paths=[str(path)]), output=str(tmp_path / f"b.jsonl{suffix}"))
        export.run(verb)
        before = Path(verb.output).read_bytes()
        with pytest.raises(ValueError, match="exists; choose another file, or set overwrite=true"):
            export.run(verb)
        verb.overwrite = True
        export.run(verb)
        assert Path(verb.output).read_bytes() == before


def test_a_store_of_the_exported_corpus_has_the_same_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    export.run(CorpusVerb(corpus=CorpusConfig(paths=[str(path)]), output=str(tmp_path / "b.jsonl.zst")))
    stores = [
        tokenize_files([tmp_path / name], tokenizer_dir, tmp_path / name[0]) for name in ("a.jsonl", "b.jsonl.zst")
    ]
    shards = [{name: content for name, content in files_of(s.path).items() if "train" in name} for s in stores]
    assert shards[0] == shards[1]


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, "{"])
    with pytest.raises(ValueError, match="line 2: malformed"):
        export.run(CorpusVerb(corpus=CorpusConfig(paths=[str(path)]), output=str(tmp_path / "b.jsonl.zst")))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_output_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output=x\.csv: must end in \.jsonl"):
        CorpusVerb(output="x.csv")
