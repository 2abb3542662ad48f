"""The corpora of conf/corpus, each read from a directory in its published layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from clex_train.token_store.store import TokenStore
from data_prep.config import TokenizeVerb
from data_prep.tokenize.run import run
from tests.data_prep.small_corpora import stored_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def redpajama_1t(folder: Path) -> tuple[str, list[str]]:
    """Write `book` compressed, `arxiv` uncompressed, and the extra files of the download."""
    root = folder / "redpajama"
    write_jsonl(root / "arxiv" / "arxiv_023.jsonl", [{"text": "paper", "meta": {"arxiv_id": "2301.1", "yymm": "2301"}}])
    write_jsonl(root / "book" / "book.jsonl.zst", [{"text": "novel", "meta": {"title": "A", "publication_date": 1850}}])
    (root / "README.md").write_text("about")
    (root / "urls.csv").write_text("a,b")
    return str(root), ["paper", "novel"]


def redpajama_book(folder: Path) -> tuple[str, list[str]]:
    root, _ = redpajama_1t(folder)
    return f"{root}/book", ["novel"]


def redpajama_v2(folder: Path) -> tuple[str, list[str]]:
    """Write documents next to quality signals and minhashes, which are not texts."""
    root = folder / "redpajama_v2"
    for bucket in ("en_head", "en_tail"):
        record = {"url": "u", "raw_content": f"page of {bucket}", "digest": "sha1:x", "language_score": 0.9}
        write_jsonl(root / "documents" / "2023-06" / "0000" / f"{bucket}.json.gz", [record])
        signals = {"id": "2023-06/0000/0", "quality_signals": json.dumps({"ccnet_length": [[0, 9, 9.0]]})}
        write_jsonl(root / "quality_signals" / "2023-06" / "0000" / f"{bucket}.signals.json.gz", [signals])
    return f"{root}/documents/*/*/en_head.json.gz", ["page of en_head"]


def slimpajama_files(folder: Path) -> tuple[str, list[str]]:
    root = folder / "SlimPajama-627B"
    for chunk in (1, 2):
        records = [
            {"text": f"{name} of chunk {chunk}", "meta": {"redpajama_set_name": f"RedPajama{name}"}}
            for name in ("Book", "C4")
        ]
        write_jsonl(root / "train" / f"chunk{chunk}" / "example_train_0.jsonl.zst", records)
    write_jsonl(root / "validation" / "chunk1" / "example_holdout_0.jsonl.zst", [{"text": "held out"}])
    return f"{root}/train", ["Book of chunk 1", "Book of chunk 2"]


def pg19_files(folder: Path) -> tuple[str, list[str]]:
    for split, number in (("train", 10), ("train", 9), ("test", 1)):
        (folder / split).mkdir(exist_ok=True)
        (folder / split / f"{number}.txt").write_text(f"book {number}\n\nby someone\n")
    (folder / "metadata.csv").write_text("10,title,1850,url")
    return f"{folder}/train", ["book 10\n\nby someone\n", "book 9\n\nby someone\n"]


def proof_pile_2(folder: Path) -> tuple[str, list[str]]:
    for subset in ("algebraic-stack", "arxiv", "open-web-math"):
        record = {"text": f"proof in {subset}", "meta": {"config": subset, "yymm": "2001"}}
        write_jsonl(folder / subset / "train" / f"{subset}_001.jsonl.zst", [record])
        write_jsonl(folder / subset / "test" / f"{subset}_002.jsonl.zst", [{"text": "held out", "meta": {}}])
    subsets = ("algebraic-stack", "arxiv", "open-web-math")
    return f"{folder}/*/train/*.jsonl.zst", [f"proof in {subset}" for subset in subsets]


def own_folder(folder: Path) -> tuple[str, list[str]]:
    write_jsonl(folder / "a" / "deep" / "x.jsonl.gz", [{"text": "line", "anything": [1]}])
    (folder / "b.txt").write_text("file")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), folder / "c.parquet")
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return str(folder), ["line", "file", "row"]


LOCAL: dict[str, Callable[[Path], tuple[str, list[str]]]] = {
    "redpajama_1t": redpajama_1t,
    "redpajama_book": redpajama_book,
    "redpajama_v2": redpajama_v2,
    "slimpajama_files": slimpajama_files,
    "pg19_files": pg19_files,
    "proof_pile_2": proof_pile_2,
    "folder": own_folder,
    "local_books": redpajama_book,
}


def pg19(folder: Path) -> list[str]:
    (folder / "data").mkdir()
    table = pyarrow.table({"short_book_title": ["A", "B"], "publication_date": [1, 2], "text": ["book a", "book b"]})
    pyarrow.parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    return ["book a", "book b"]


def slimpajama_book(folder: Path) -> list[str]:
    slimpajama_files(folder.parent / "x")
    (folder.parent / "x" / "SlimPajama-627B").rename(folder / "SlimPajama-627B")
    files = "  data_files:\n  - split: train\n    path: SlimPajama-627B/train/*/*\n"
    card = f"---\nconfigs:\n- config_name: default\n{files}---\n"
    (folder / "README.md").write_text(card)
    return ["Book of chunk 1", "Book of chunk 2"]


HUB: dict[str, Callable[[Path], list[str]]] = {"pg19": pg19, "slimpajama_book": slimpajama_book}


def tokenize(name: str, tokenizer: Path, output: Path, **keys: Any) -> list[str]:
    """Tokenize a corpus by name with some keys replaced, composed as by `python -m data_prep tokenize`."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="data_prep_schema", node=TokenizeVerb)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        composed = compose("data_prep", [f"+corpus={name}"])
    for key, value in (keys | {"corpus.validation_share": 0.0, "output": str(output)}).items():
        OmegaConf.update(composed, key, value)
    by_path = OmegaConf.is_dict(composed.tokenizer)
    OmegaConf.update(composed, "tokenizer.path" if by_path else "tokenizer", str(tokenizer))
    run(OmegaConf.to_object(composed))  # type: ignore[arg-type]
    return stored_texts(TokenStore(output))


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_files_in_the_published_layout_give_their_texts(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    paths, texts = LOCAL[name](tmp_path / "in")
    assert tokenize(name, tokenizer_dir, tmp_path / "store", **{"corpus.paths": [paths]}) == texts


@pytest.mark.parametrize("name", sorted(HUB))
def test_a_local_copy_of_the_hub_gives_its_texts(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = HUB[name](tmp_path / "in")
    assert tokenize(name, tokenizer_dir, tmp_path / "store", **{"corpus.hub": str(tmp_path / "in")}) == texts


def test_every_corpus_has_its_layout_tested() -> None:
    names = {path.stem for path in (ROOT / "conf" / "corpus").glob("*.yaml")}
    # The last is written by a verb of its own and read back in test_retrieval_text.py.
    assert names == {*LOCAL, *HUB, "stdlib", "retrieval_text"}
