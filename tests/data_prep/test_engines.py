"""Tokenizer engines: gigatoken must give the ids of `tokenizers`, or is not used."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from clex_train.token_store.manifest import partial_path
from clex_train.token_store.store import TokenStore
from data_prep.config import EngineChoice, Format
from data_prep.corpus.sources import expand
from data_prep.corpus.streams import open_stream
from data_prep.tokenize import engines, sampling
from data_prep.tokenize.engines import GigatokenEngine, TokenizersEngine, Unsupported, choose, trusted_characters
from tests.data_prep.small_corpora import TEXTS, files_of, tokenize_files, write_jsonl
from tests.data_prep.tokenizer_variants import byte_level_variants, learn, sentencepiece, with_parts

pytest.importorskip("gigatoken")

WORDS = [
    "the",
    "of",
    "and",
    "'s",
    "'LL",
    "can't",
    "It's",
    "naïve",
    "橋を",
    "123",
    "4567",
    "</s>",
    "<pad>",
    "<s>",
    "👩\u200d👩\u200d👧\u200d👦",
    "ẹ́",
    "\r\n",
    "\n\n",
    "\t",
    "\x00",
    "\u2028",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Make texts of every kind of character among words and white space, and long runs of one character."""
    generator = random.Random(seed)
    return ["".join(_part(generator) for _ in range(generator.randrange(1, 200))) for _ in range(count)] + [
        character * n for character in ("a", " ", "\n", "\r\n", "\x00", "é", "橋", "🌉", "-", "1") for n in (1, 3, 5000)
    ]


def _part(generator: random.Random) -> str:
    kind = generator.random()
    if kind < 0.5:
        return generator.choice((" ", "")) + generator.choice(WORDS)
    if kind < 0.8:
        return chr(generator.randrange(0x20, 0x3100))
    point = generator.randrange(0x110000)
    return chr(point) if not 0xD800 <= point < 0xE000 else "\ufffd"


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return learn([Path(__file__).read_text(encoding="utf-8"), *TEXTS, "tion 's ss 'll " * 50])


@pytest.mark.parametrize("name", ["gpt2", "gpt2, NFC", "llama3", "qwen2", "o200k"])
def test_gigatoken_matches_tokenizers_for_any_text(base: dict[str, Any], name: str) -> None:
    content = json.dumps(byte_level_variants(base)[name])
    texts = random_texts(1500)
    for text, ours, theirs in zip(
        texts, GigatokenEngine(content).encode(texts), TokenizersEngine(content).encode(texts), strict=True
    ):
        assert ours.tolist() == theirs.tolist(), ascii(text)


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2, NFC", marks=pytest.mark.slow), pytest.param("llama3", marks=pytest.mark.slow), "o200k"]
)
def test_gigatoken_matches_tokenizers_on_every_trusted_character(base: dict[str, Any], name: str) -> None:
    """Put each character between words, where its class (letter, number, white space, mark) changes the ids."""
    content = json.dumps(byte_level_variants(base)[name])
    characters = [chr(point) for point in np.flatnonzero(trusted_characters())]
    texts = [
        f"{c}'ss a{c}tion 12{c}34 {c} b\u0345{c}a\u0334{c}\u0301" for c in characters if not 0xD800 <= ord(c) < 0xE000
    ]
    ours, theirs = GigatokenEngine(content).encode(texts), TokenizersEngine(content).encode(texts)
    assert [c for c, a, b in zip(characters, ours, theirs, strict=False) if a.tolist() != b.tolist()] == []


def test_characters_of_newer_unicode_versions_are_left_to_tokenizers(base: dict[str, Any]) -> None:
    """Use a letter that is new in Unicode 17, after which gigatoken alone would split off `'s` as a contraction."""
    content = json.dumps(base)
    texts = ["plain", "\U000328dc'ss"]
    engine = GigatokenEngine(content)
    assert not np.array_equal(engine._encode(texts)[1], TokenizersEngine(content).encode(texts)[1])
    assert np.array_equal(engine.encode(texts)[1], TokenizersEngine(content).encode(texts)[1])


def test_the_cache_of_gigatoken_is_bounded(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode words that never repeat and fill the cache, which must be dropped when it has grown."""
    monkeypatch.setattr(engines, "MAX_GROWTH_BYTES", 30_000_000)
    engine, generator = GigatokenEngine(json.dumps(base)), np.random.default_rng(0)
    renewed = []
    renew = engine._renew
    monkeypatch.setattr(engine, "_renew", lambda: (renewed.append(engines.resident_bytes()), renew()))
    for _ in range(30):
        letters = generator.integers(97, 123, 1_000_000, dtype=np.uint8)
        letters[generator.integers(0, len(letters), 160_000)] = 32
        engine.encode([letters.tobytes().decode()])
    assert len(renewed) >= 3
    assert renewed[-1] - renewed[0] < 100_000_000


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Unsupported normalizer type: Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Unsupported pre_tokenizer"),
    ],
)
def test_a_tokenizer_gigatoken_cannot_run_falls_back_or_is_refused(
    base: dict[str, Any], parts: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "data_prep")
    content = json.dumps(with_parts(base, **parts))
    assert choose(EngineChoice.auto, content) == "tokenizers"
    assert len(caplog.messages) == 1
    assert reason in caplog.text
    with pytest.raises(ValueError, match=rf"tokenizer.engine=gigatoken: cannot be used: .*{reason}"):
        choose(EngineChoice.gigatoken, content)


def test_auto_reports_once_that_gigatoken_is_missing(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "data_prep")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose(EngineChoice.auto, json.dumps(base)) == "tokenizers"
    assert caplog.text.count("it is not installed (pip install gigatoken)") == 1
    with pytest.raises(ValueError, match=r"tokenizer.engine=gigatoken: cannot be used: it is not installed"):
        choose(EngineChoice.gigatoken, json.dumps(base))


def test_an_engine_with_wrong_ids_for_a_probe_is_not_used(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = GigatokenEngine._encode
    monkeypatch.setattr(GigatokenEngine, "_encode", lambda self, texts: [ids + 1 for ids in encode(self, texts)])
    with pytest.raises(Unsupported, match="other ids than tokenizers"):
        GigatokenEngine(json.dumps(base))


def corpus_of(tmp_path: Path) -> Path:
    generator = random.Random(3)
    words = [word for text in TEXTS for word in text.split(" ")]
    records = [{"text": f"{i} </s> " + " ".join(generator.choices(words, k=400))} for i in range(300)]
    records += [{"text": text + "."} for text in random_texts(50)]
    write_jsonl(tmp_path / "a.jsonl", records)
    return write_jsonl(tmp_path / "b.jsonl.zst", records[::2]).parent


@pytest.mark.parametrize("workers", [1, 2])
def test_the_store_does_not_depend_on_the_engine(tmp_path: Path, tokenizer_dir: Path, workers: int) -> None:
    corpus = corpus_of(tmp_path / "corpus")
    stores = [
        tokenize_files([corpus], tokenizer_dir, tmp_path / engine, shard_mb=1, workers=workers, engine=engine)
        for engine in ("gigatoken", "tokenizers", "auto")
    ]
    contents = [{k: v for k, v in files_of(store.path).items() if k != "manifest.json"} for store in stores]
    assert contents[0] == contents[1] == contents[2]
    assert len({store.fingerprint for store in stores}) == 1
    assert ["gigatoken" in store.manifest.versions for store in stores] == [True, False, True]
    assert all(store.manifest.settings == stores[0].manifest.settings for store in stores)


@pytest.fixture
def wrong_after_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make gigatoken return wrong ids for documents with the word "seventh"."""
    encode = GigatokenEngine._encode

    def err(self: GigatokenEngine, texts: list[str]) -> list[np.ndarray]:
        return [ids[::-1] if "seventh" in text else ids for text, ids in zip(texts, encode(self, texts), strict=True)]

    monkeypatch.setattr(GigatokenEngine, "_encode", err)
    monkeypatch.setattr(sampling, "MEAN_GAP_CHARS", 1)


@pytest.mark.usefixtures("wrong_after_the_probes")
def test_a_shard_with_wrong_ids_is_redone_by_tokenizers(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"text": f"document {i} {'x y ' * 20000}" + (" seventh" if i == 7 else "")} for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", shard_mb=1)
    reference = tokenize_files([path], tokenizer_dir, tmp_path / "reference", shard_mb=1, engine="tokenizers")
    assert store.fingerprint == reference.fingerprint
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "shard 00000" in warning
    assert "a.jsonl: line 8: gigatoken and tokenizers give different ids for this document" in warning
    assert "gigatoken" in store.manifest.versions, "the second shard is gigatoken's"


@pytest.mark.usefixtures("wrong_after_the_probes")
def test_wrong_ids_of_a_requested_gigatoken_are_an_error_naming_the_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "the seventh"}])
    with pytest.raises(
        ValueError, match=r"tokenizer.engine=gigatoken: .*a.jsonl: line 2: gigatoken and tokenizers give"
    ):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", engine="gigatoken")
    assert not list(partial_path(tmp_path / "store").rglob("*.tmp"))


def test_the_verified_sample_is_small_and_starts_with_the_first_documents(base: dict[str, Any]) -> None:
    compared: list[str] = []

    class Recording(TokenizersEngine):
        def encode(self, texts):
            compared.extend(texts)
            return [np.zeros(1, np.uint32) for _ in texts]

    check = sampling.SampleCheck(Recording(json.dumps(base)), "00000")
    texts = ["x" * 16_000] * 1000
    for _ in range(20):
        check.compare(texts, [np.zeros(1, np.uint32)] * len(texts))
    share = sum(map(len, compared)) / (20 * 1000 * 16_000)
    assert 1 / 10_000 < share < 1 / 1000
    check = sampling.SampleCheck(Recording(json.dumps(base)), "00000")
    with pytest.raises(sampling.Mismatch):
        check.compare(["first"], [np.ones(1, np.uint32)])


def test_a_store_started_with_one_engine_can_be_finished_by_another(tmp_path: Path, tokenizer_dir: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "x y " * 400_000}])
    bad = write_jsonl(tmp_path / "b.jsonl", ["{" + " " * 100])
    with pytest.raises(ValueError, match="malformed"):
        tokenize_files([good, bad], tokenizer_dir, tmp_path / "store", shard_mb=1, engine="gigatoken")
    bad.write_bytes(b'{"text": "now good"}'.ljust(bad.stat().st_size - 1) + b"\n")
    store = tokenize_files([good, bad], tokenizer_dir, tmp_path / "store", shard_mb=1, engine="tokenizers")
    whole = tokenize_files([good, bad], tokenizer_dir, tmp_path / "whole", shard_mb=1, engine="tokenizers")
    assert store.fingerprint == whole.fingerprint
    assert "gigatoken" in store.manifest.versions


def test_a_source_changed_after_its_shard_was_finished_is_detected(tmp_path: Path, tokenizer_dir: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "x y " * 400_000}])
    bad = write_jsonl(tmp_path / "b.jsonl", ["{" + " " * 100])
    content = good.read_bytes()

    def run() -> TokenStore:
        return tokenize_files([good, bad], tokenizer_dir, tmp_path / "store", shard_mb=1)

    with pytest.raises(ValueError, match="malformed"):
        run()
    good.write_bytes(content.replace(b"x", b"z"))
    with pytest.raises(ValueError, match=r"a.jsonl: changed \(with the same size\) since shard 00000 was written"):
        run()
    good.write_bytes(content)  # Equal bytes with another modification time count as the same source.
    with pytest.raises(ValueError, match="malformed"):
        run()


@pytest.mark.slow
def test_gigatoken_matches_tokenizers_on_all_shared_text(tmp_path: Path, shared_data: Path) -> None:
    """Compare every document of the four subsets with `tokenizers`, byte-level and SentencePiece."""
    files, texts = [str(shared_data / "*" / "*.jsonl.*")], []
    for path in expand(files, Format.auto):
        with open_stream(path) as (content, _):
            texts += [json.loads(line)["text"] for line in content]
    learned = [text[:20_000] for text in texts]
    for name, content in (("bytes", learn(learned, 4000)), ("sp", sentencepiece(learned))):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="</s>")
        tokenizer.save_pretrained(tmp_path / name)
        store = tokenize_files(files, tmp_path / name, tmp_path / f"{name}-store")
        reference = TokenizersEngine(json.dumps(content))
        assert "gigatoken" in store.manifest.versions
        for (_, start, stop), text in zip(store.documents(), texts, strict=True):
            assert np.array_equal(store.tokens(start, stop - 1), reference.encode([text])[0])
