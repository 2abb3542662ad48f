"""The verb `decontaminate`: matches against sets of n-grams in plain Python, and the store that it writes."""

import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clex_train.evaluation import windows
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import RunStopped
from data_prep.config import CorpusConfig, DecontaminateVerb, EvaluationStore
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import plan
from data_prep.decontaminate import contamination, ngrams
from data_prep.decontaminate import run as decontaminate
from tests.data_prep.small_corpora import files_of, stored_texts, tokenize_files, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"word{i}" for i in range(4000)]


def prose(seed: int, num_words: int) -> str:
    """Draw words at random; two such texts share hardly a 2-gram."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def changed(text: str, share: float, seed: int = 0) -> str:
    """Replace this share of the words of a text."""
    draw = random.Random(seed)
    return " ".join(f"new{i}" if draw.random() < share else word for i, word in enumerate(text.split()))


def reference_sets(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()


def reference(a: str, b: str, n: int) -> tuple[float, float]:
    """Return (Jaccard, containment of a in b) of the sets of n-grams."""
    of_a, of_b = reference_sets(a, n), reference_sets(b, n)
    return len(of_a & of_b) / max(1, len(of_a | of_b)), len(of_a & of_b) / max(1, len(of_a))


TRAIN = [
    prose(1, 3000),
    prose(2, 500) + " shared quotation " + prose(100, 60) + " " + prose(3, 500),
    prose(4, 400),
    prose(5, 3000) + " " + prose(200, 150) + " " + prose(6, 3000),
    "?! ... --",
    prose(7, 20_000),
]
EVALUATION = {
    "unrelated": prose(50, 900),
    "exact": prose(1, 3000),
    "near": changed(prose(4, 400), 0.1),
    "quotation": prose(51, 900) + " " + prose(100, 60) + " " + prose(52, 900),
    "short inside long": prose(200, 150),
    "wordless": "!!! ??? ***",
}
NAMES = list(EVALUATION)


def make_store(folder: Path, name: str, tokenizer: Path, texts: list[str], split: str) -> Path:
    """Write a store with all texts in one split."""
    path = write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    tokenize_files([path], tokenizer, folder / name, validation_share=float(split == "validation"))
    return folder / name


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    train = make_store(folder, "train", tokenizer_dir, TRAIN, "train")
    return train, make_store(folder, "evaluation", tokenizer_dir, list(EVALUATION.values()), "validation")


def run(stores: tuple[Path, Path], report: Path, **settings: Any) -> dict[str, Any]:
    """Run the verb and return the content of report.json."""
    train, evaluation = stores
    with suppress(RunStopped):
        decontaminate.run(
            DecontaminateVerb(str(train), EvaluationStore(str(evaluation)), report=str(report), **settings)
        )
    return dict(json.loads((report / "report.json").read_text()))


def pairs_of(report: dict[str, Any]) -> dict[tuple[str, int], list[str]]:
    return {(NAMES[pair["evaluation_doc"]], pair["train_doc"]): pair["rules"] for pair in report["pairs"]}


def test_planted_duplicates_are_found_by_their_rule_and_nothing_else_is(stores, tmp_path: Path) -> None:
    report = run(stores, tmp_path)
    assert pairs_of(report) == {
        ("exact", 0): ["similarity", "containment", "minhash"],
        ("near", 2): ["similarity", "containment", "minhash"],
        ("short inside long", 3): ["containment"],
    }
    assert [NAMES[entry["document"]] for entry in report["contaminated"]] == ["exact", "near", "short inside long"]
    nearest = report["nearest_below_the_limits"][0]
    assert (NAMES[nearest["evaluation_doc"]], nearest["train_doc"]) == ("quotation", 1)
    assert 0 < nearest["similarity"] < 0.1
    assert [NAMES[doc["document"]] for doc in report["evaluation_documents_without_words"]] == ["wordless"]
    assert report["counts"]["train_documents_without_words"] == 1


def test_similarity_and_containment_equal_those_of_python_sets(stores, tmp_path: Path) -> None:
    report = run(stores, tmp_path, threshold=1e-6, ngrams=[1, 2, 4])
    assert len(report["pairs"]) > 10
    texts = list(EVALUATION.values())
    for pair in report["pairs"]:
        expected = [reference(texts[pair["evaluation_doc"]], TRAIN[pair["train_doc"]], n) for n in (1, 2, 4)]
        assert list(pair["jaccard"].values()) == pytest.approx([jaccard for jaccard, _ in expected], abs=1e-12)
        assert list(pair["contained"].values()) == pytest.approx([share for _, share in expected], abs=1e-12)
        assert pair["similarity"] == pytest.approx(np.mean([jaccard for jaccard, _ in expected]))
        assert pair["containment"] == pytest.approx(np.mean([share for _, share in expected]))
    found = {(pair["evaluation_doc"], pair["train_doc"]) for pair in report["pairs"]}
    pairs = [(e, t) for e in range(len(texts)) for t in range(len(TRAIN))]
    assert found == {(e, t) for e, t in pairs if any(reference(texts[e], TRAIN[t], n)[0] for n in (1, 2, 4))}


def test_real_documents_are_compared_exactly(tiny_store: Path, tmp_path: Path) -> None:
    """Compare the two splits of a store of Python sources, with punctuation and line ends."""
    report = run((tiny_store, tiny_store), tmp_path, threshold=0.001)
    train = stored_texts(TokenStore(tiny_store))
    held_out = stored_texts(TokenStore(tiny_store, "validation"))
    assert report["pairs"]
    for pair in report["pairs"]:
        expected = [reference(held_out[pair["evaluation_doc"]], train[pair["train_doc"]], n)[0] for n in (2, 3, 4)]
        assert list(pair["jaccard"].values()) == pytest.approx(expected, abs=1e-12)


def test_a_page_of_a_real_training_document_is_found(shared_data: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    """Check its containment, and that of every other reported pair, against plain Python."""
    corpus = CorpusConfig(paths=[str(shared_data / "spec")])
    texts = [d.text for unit in plan(corpus, 10**9) for p in unit.pieces for d in documents(p, corpus, Counter())]
    texts = [text[:20_000] for text in texts[:24]]
    train = make_store(tmp_path, "train", tokenizer_dir, texts[:20], "train")
    page = texts[0][5_000:9_000]
    evaluation = make_store(tmp_path, "evaluation", tokenizer_dir, [*texts[20:], page], "validation")
    report = run((train, evaluation), tmp_path / "report")
    assert (4, 0) in {(pair["evaluation_doc"], pair["train_doc"]) for pair in report["pairs"]}
    page_pair = next(pair for pair in report["pairs"] if (pair["evaluation_doc"], pair["train_doc"]) == (4, 0))
    assert page_pair["containment"] > 0.95
    for pair in report["pairs"]:
        of = [reference([*texts[20:], page][pair["evaluation_doc"]], texts[pair["train_doc"]], n) for n in (2, 3, 4)]
        assert pair["similarity"] == pytest.approx(np.mean([jaccard for jaccard, _ in of]))
        assert pair["containment"] == pytest.approx(np.mean([share for _, share in of]))


def test_the_report_does_not_depend_on_workers_chunks_or_passes(
    stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(stores, tmp_path / "a")
    monkeypatch.setattr(decontaminate, "CHUNK_TOKENS", 1000)
    monkeypatch.setattr(decontaminate, "BATCH_WORDS", 2000)
    assert run(stores, tmp_path / "b", workers=2) == expected
    monkeypatch.setattr(decontaminate, "_groups", lambda evaluation, config: ([doc] for doc in range(len(NAMES))))
    assert run(stores, tmp_path / "c") == expected
    assert files_of(tmp_path / "a").keys() == {"report.json", "report.md"}


def test_cutting_long_documents_does_not_change_the_report(stores, tmp_path: Path, monkeypatch) -> None:
    expected = run(stores, tmp_path / "a", threshold=1e-6)
    monkeypatch.setattr(ngrams, "PIECE_TOKENS", 300)
    monkeypatch.setattr(ngrams, "_LOOK_BACK", 200)
    monkeypatch.setattr(ngrams, "PART_WORDS", 97)
    monkeypatch.setattr(ngrams, "_FLAT", 50)
    assert run(stores, tmp_path / "b", threshold=1e-6) == expected


def test_minhash_estimates_the_jaccard_of_shingles() -> None:
    texts = [prose(1, 2000), changed(prose(1, 2000), 0.1), prose(2, 2000)]
    words = [np.array([zlib.crc32(word.encode()) for word in text.split()], np.uint64) for text in texts]
    signatures = np.stack([contamination.signature(w, 3, 256) for w in words])
    sketches = contamination.Sketches(signatures[:1], np.ones(1, bool), 0.4)
    assert sketches.estimate(0, signatures[1]) == pytest.approx(reference(texts[0], texts[1], 3)[0], abs=0.1)
    assert sketches.near(signatures[0]) == sketches.near(signatures[1]) == [0]
    assert sketches.near(signatures[2]) == []


def test_minhash_alone_finds_near_duplicates(stores, tmp_path: Path) -> None:
    report = run(stores, tmp_path, threshold=1.0, containment=1.0)
    assert pairs_of(report)[("near", 2)] == ["minhash"]
    without = run(stores, tmp_path, threshold=1.0, containment=1.0, minhash_threshold=None)
    assert ("near", 2) not in pairs_of(without)


def test_the_output_has_all_other_documents_and_records_the_removed_ones(stores, tmp_path: Path) -> None:
    output = tmp_path / "clean"
    run(stores, tmp_path / "report", output=str(output))
    store, before = TokenStore(output, "validation"), TokenStore(stores[1], "validation")
    kept = [0, 3, 5]
    assert stored_texts(store) == [EVALUATION[NAMES[doc]] for doc in kept]
    assert [store.origin(doc) for doc in range(3)] == [before.origin(doc) for doc in kept]
    assert store.text_hashes().tolist() == before.text_hashes()[kept].tolist()
    left_out = store.manifest.settings["left_out"]
    assert [NAMES[entry["document"]] for entry in left_out] == ["exact", "near", "short inside long"]
    assert left_out[0]["origin"].endswith("evaluation.jsonl: record 2")
    assert left_out[0]["strongest"]["train_origin"].endswith("train.jsonl: record 1")
    assert left_out[2]["pairs_by_rule"] == {"containment": 1}
    chosen = windows.select(store, longest=256, num_windows=2)
    assert set(chosen.documents.tolist()) <= {0, 1}
    clean = run((stores[0], output), tmp_path / "again")
    assert clean["pairs"] == []


def test_the_markdown_names_the_origin_of_both_sides(stores, tmp_path: Path) -> None:
    run(stores, tmp_path)
    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if "evaluation.jsonl: record 5" in line)
    assert "train.jsonl: record 4" in row
    assert row.endswith("| containment |")
    assert "- threshold: 0.1" in text


def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "data_prep", "decontaminate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_exit_code_distinguishes_clean_from_contaminated(stores, tmp_path: Path) -> None:
    inputs = [f"train={stores[0]}", f"evaluation={stores[1]}"]
    found = call(*inputs, f"report={tmp_path}/found")
    assert found.returncode == 3
    line = found.stderr.splitlines()[-1]
    assert "3 of 6 documents are contaminated" in line
    assert "output=STORE writes a store without them" in line
    written = call(*inputs, f"output={tmp_path}/clean")
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "clean.decontamination" / "report.json").is_file()
    clean = call(inputs[0], f"evaluation={tmp_path}/clean")
    assert clean.returncode == 0, clean.stderr
    assert "0 contaminated" in clean.stdout


def test_no_store_is_written_if_no_document_remains(stores, tmp_path: Path) -> None:
    only = make_store(tmp_path, "only", stores[1] / "tokenizer", [TRAIN[0]], "validation")
    config = DecontaminateVerb(
        str(stores[0]), EvaluationStore(str(only)), str(tmp_path / "clean"), str(tmp_path / "report"), threshold=1.0
    )
    with pytest.raises(RunStopped, match=r"1 of 1 documents are contaminated.*choose other evaluation documents"):
        decontaminate.run(config)
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": None}, "train: name the directory of a token store"),
        ({"train": "nowhere"}, "^train=nowhere: no such directory"),
        ({"evaluation": "nowhere"}, "^evaluation=nowhere: no such directory"),
        ({"ngrams": []}, r"ngrams=\[\]: name at least one size"),
        ({"ngrams": [2, 0]}, r"ngrams=\[2, 0\]: different sizes of at least 1"),
        ({"threshold": 1.5}, "threshold=1.5: must be in"),
        ({"containment": -0.1}, "containment=-0.1: must be in"),
        ({"minhash_threshold": 0.0}, "minhash_threshold=0.0: must be in"),
        ({"workers": 0}, "workers=0: at least 1"),
        ({"output": "EVALUATION", "overwrite": True}, "is one of the input stores"),
        ({"output": "REPORT"}, "exists; choose another path, or set overwrite=true"),
        ({"report": "/proc/report"}, "report=/proc/report: cannot write there"),
    ],
)
def test_wrong_input_is_refused_by_key(stores, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    given = {"train": str(stores[0]), "evaluation": str(stores[1]), "report": str(tmp_path)} | settings
    evaluation = EvaluationStore(given.pop("evaluation"))
    if "output" in given:
        given["output"] = {"EVALUATION": str(stores[1]), "REPORT": str(tmp_path)}[given["output"]]
    with pytest.raises(ValueError, match=message):
        decontaminate.run(DecontaminateVerb(evaluation=evaluation, **given))
    assert not (tmp_path / "report.json").exists()


def test_a_store_without_validation_documents_is_named(stores, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluation=.*no validation documents"):
        run((stores[0], stores[0]), tmp_path)


def test_each_character_is_a_word_in_scripts_without_spaces() -> None:
    assert ngrams.split_words("Straße, 橋を渡る don't x_1") == ["strasse", "橋", "を", "渡", "る", "don", "t", "x_1"]
