"""The verb `train_tokenizer`: lossless, deterministic, and loadable by Hugging Face."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep import train_tokenizer
from data_prep.config import CorpusConfig, CorpusSource, TrainTokenizerVerb
from data_prep.corpus.documents import documents
from data_prep.corpus.sources import plan
from data_prep.corpus.streams import open_stream
from tests.data_prep.small_corpora import TEXTS, files_of, write_jsonl


def train(paths: list[Path], output: Path, **settings: Any) -> Path:
    share = settings.pop("validation_share", 0.0)
    corpus = CorpusConfig(paths=[str(path) for path in paths], validation_share=share)
    train_tokenizer.run(TrainTokenizerVerb(corpus=corpus, output=str(output), **settings))
    return output


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", [{"text": text} for text in TEXTS * 5])


def test_special_tokens_have_the_ids_that_the_tiny_models_expect(corpus: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(train([corpus], tmp_path / "t", vocab_size=300, model_max_length=128))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 128
    assert len(tokenizer) == 300
    assert tokenizer.is_fast


@settings(max_examples=100)
@given(text=st.text(max_size=200))
def test_any_text_survives_encoding_and_decoding(tokenizer_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_real_text_survives_encoding_and_decoding(tokenizer_dir: Path, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for file in ("latex/latex-00000.jsonl.zst", "code/code-00000.jsonl.gz", "book/book-00002.jsonl.zst"):
        with open_stream(shared_data / file) as (content, _):
            text = json.loads(content.readline())["text"][:100_000]
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    """Use a corpus large enough for a race between the threads of the trainer to show."""
    corpus = CorpusConfig(source=CorpusSource.stdlib, validation_share=0.1)
    for name in ("a", "b"):
        verb = TrainTokenizerVerb(corpus=corpus, output=str(tmp_path / name), vocab_size=1000, max_mb=3)
        train_tokenizer.run(verb)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_held_out_documents_are_not_used_for_training(tmp_path: Path) -> None:
    content = [{"text": f"{i} " + ("zebra" if i % 2 else "quagga") * 5} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", content)
    corpus = CorpusConfig(paths=[str(path)], validation_share=0.5)
    (unit,) = plan(corpus, 1 << 40)
    splits = {d.text: d.split for d in documents(unit.pieces[0], corpus, Counter(), below=2.0**63)}
    read = list(train_tokenizer._texts([unit], corpus, 10**9))
    assert read == [text for text, split in splits.items() if split == "train"]
    assert 60 < len(read) < 140


def test_no_more_than_max_mb_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " + "x" * 100_000} for i in range(30)])
    corpus = CorpusConfig(paths=[str(path)], validation_share=0.0)
    read = list(train_tokenizer._texts(plan(corpus, 1 << 40), corpus, 1_000_000))
    assert len(read) == 10


def test_a_small_corpus_gives_fewer_tokens_and_a_report(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train([corpus], tmp_path / "t", vocab_size=50_000)
    assert "vocab_size=50000: the corpus yields only" in caplog.text


def test_an_existing_output_is_kept_unless_overwritten(corpus: Path, tmp_path: Path) -> None:
    train([corpus], tmp_path / "t", vocab_size=300)
    with pytest.raises(ValueError, match=r"output=.*t: exists; choose another directory, or set overwrite=true"):
        train([corpus], tmp_path / "t", vocab_size=301)
    assert len(AutoTokenizer.from_pretrained(train([corpus], tmp_path / "t", vocab_size=301, overwrite=True))) == 301


def test_a_completely_held_out_corpus_is_refused_as_empty(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the corpus is empty, it has no training documents"):
        train([corpus], tmp_path / "t", vocab_size=300, validation_share=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 258}, "vocab_size=258: at least 259"),
        ({"max_mb": 0}, "max_mb=0: at least 1"),
        ({"eos_token": "<s>"}, "eos_token=<s>: special tokens must differ"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainTokenizerVerb(**settings)
