"""Sources of a corpus: files, their order and work units, as a function of configuration and files only."""

from pathlib import Path

import pytest

from data_prep.config import CorpusConfig, CorpusSource, Format
from data_prep.corpus import stdlib
from data_prep.corpus.sources import Unit, expand, plan
from tests.data_prep.small_corpora import write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.jsonl", "b/1.jsonl.zst", "a.txt", "c.jsonl.gz", ".hidden/3.jsonl", "notes.pdf", "README.md"):
        write_jsonl(tmp_path / name, [{"text": name}])
    return tmp_path


def names(files: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in files]


def test_a_directory_lists_its_texts_sorted_without_hidden_and_unknown_files(folder: Path) -> None:
    assert names(expand([str(folder)], Format.auto), folder) == ["a.txt", "b/1.jsonl.zst", "b/2.jsonl", "c.jsonl.gz"]


def test_entries_keep_their_order_and_globs_are_sorted(folder: Path) -> None:
    entries = [str(folder / "c.jsonl.gz"), str(folder / "b" / "*.jsonl*"), str(folder / "**" / "a.txt")]
    assert names(expand(entries, Format.auto), folder) == ["c.jsonl.gz", "b/1.jsonl.zst", "b/2.jsonl", "a.txt"]


def test_a_file_named_twice_is_read_once_and_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = expand([str(folder / "a.txt"), str(folder)], Format.auto)
    assert names(files, folder) == ["a.txt", "b/1.jsonl.zst", "b/2.jsonl", "c.jsonl.gz"]
    assert "a.txt twice; it is read once" in caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere", "nowhere: no such file, directory or glob"),
        ("*.xyz", "no such file, directory or glob"),
        (".hidden", ""),
        ("notes.pdf", "notes.pdf: unknown suffix; set corpus.format"),
        ("empty", "empty: no file of a known format in this directory"),
    ],
)
def test_an_unreadable_source_is_refused_in_one_line(folder: Path, entry: str, message: str) -> None:
    (folder / "empty").mkdir()
    corpus = CorpusConfig(paths=[str(folder / entry)])
    if not message:
        assert len(plan(corpus, 1000)) == 1, "a hidden directory that is named is meant"
        return
    with pytest.raises(ValueError, match=message.replace("*", r"\*")) as caught:
        plan(corpus, 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig(), r"corpus.paths=\[\]: nothing to read; add \+corpus=NAME"),
        (CorpusConfig(source=CorpusSource.hub), "corpus.hub: name a hub data set"),
    ],
)
def test_a_corpus_without_sources_is_refused_with_a_remedy(corpus: CorpusConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(corpus, 1000)


def test_empty_files_are_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="the corpus is empty"):
        plan(CorpusConfig(paths=[str(tmp_path / "a.jsonl")]), 1000)


def spans(units: list[Unit]) -> list[list[tuple[str, int, int]]]:
    return [[(Path(p.path).name, p.start, p.stop) for p in unit.pieces] for unit in units]


def test_large_plain_files_are_cut_and_small_files_share_a_unit(tmp_path: Path) -> None:
    sizes = {"a.jsonl": 250, "b.jsonl.gz": 250, "c.txt": 40, "d.txt": 40, "e.txt": 40, "f.txt": 10}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    units = plan(CorpusConfig(paths=[str(tmp_path)]), 100)
    assert spans(units) == [
        [("a.jsonl", 0, 100)],
        [("a.jsonl", 100, 200)],
        [("a.jsonl", 200, 250), ("b.jsonl.gz", 0, 250)],
        [("c.txt", 0, 40), ("d.txt", 0, 40), ("e.txt", 0, 40)],
        [("f.txt", 0, 10)],
    ]
    assert [unit.first_source for unit in units] == [0, 1, 2, 4, 7]
    assert [unit.name for unit in units] == ["00000", "00001", "00002", "00003", "00004"]


def test_the_standard_library_is_found_without_tests_and_tables() -> None:
    modules = [path.relative_to(stdlib.root()).as_posix() for path in stdlib.modules()]
    assert {"abc.py", "asyncio/base_events.py", "json/decoder.py", "typing.py"} <= set(modules)
    assert modules == sorted(modules, key=lambda name: Path(name).parts)
    left_out = {"test", "tests", "encodings", "pydoc_data", "idlelib", "site-packages", "dist-packages"}
    assert not [name for name in modules if left_out.intersection(name.split("/"))]
    assert sum(path.stat().st_size for path in stdlib.modules()) > 5_000_000


def test_every_module_of_the_standard_library_is_a_document() -> None:
    """Check that each is UTF-8 and not empty, so that none is refused later."""
    for path in stdlib.modules():
        assert path.read_text(encoding="utf-8").strip()


def test_the_standard_library_is_that_of_the_base_python_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/test/x.py", "dist-packages/y.py", "__init__.py", "_sysconfigdata_linux.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "__init__.py" else "x = 1\n")
    assert [p.relative_to(tmp_path).as_posix() for p in stdlib.modules(tmp_path)] == ["a/z.py", "b.py"]
    with pytest.raises(ValueError, match=r"no \.py files in"):
        stdlib.modules(tmp_path / "a" / "test" / "none")
