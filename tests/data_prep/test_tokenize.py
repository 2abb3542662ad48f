"""The verb `tokenize`: stores equal the corpus token for token, and their bytes depend only on the request."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from clex_train.data.concat_packing import ConcatRows
from clex_train.token_store.manifest import partial_path
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import check_tokenizer
from data_prep.config import CorpusConfig, CorpusSource, TokenizerConfig, TokenizeVerb
from data_prep.corpus.streams import open_stream
from data_prep.tokenize import shards
from data_prep.tokenize.run import run
from tests.data_prep.small_corpora import TEXTS, files_of, stored_texts, tokenize_files, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def records(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Make documents of 1 to 2,000 words, all different."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 2000, count)
    words = [word for text in TEXTS for word in text.split(" ")]
    return [{"text": f"{seed}-{i} " + " ".join(generator.choice(words, n))} for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write several files of several kinds, a few megabytes, more than one shard of one megabyte."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", records(400))
    write_jsonl(folder / "b.jsonl.zst", records(50, seed=1))
    write_jsonl(folder / "c.jsonl.gz", records(50, seed=2))
    (folder / "d.txt").write_text(TEXTS[2])
    return folder


@pytest.fixture(scope="module")
def store(corpus: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tokenize_files(
        [corpus], tokenizer_dir, tmp_path_factory.mktemp("out") / "store", shard_mb=1, validation_share=0.2
    )


def test_every_document_decodes_to_its_text(store: TokenStore) -> None:
    expected = [record["text"] for seed, n in ((0, 400), (1, 50), (2, 50)) for record in records(n, seed)] + [TEXTS[2]]
    train, validation = stored_texts(store), stored_texts(store.split("validation"))
    assert sorted(train + validation) == sorted(expected)
    kept = set(train)
    assert [text for text in expected if text in kept] == train, "in the order of the files"


def test_rows_equal_those_of_one_long_list_of_tokens(corpus: Path, store: TokenStore, tokenizer_dir: Path) -> None:
    """Compare with a slow reference: Hugging Face's tokenizer, a Python list, EOS added by hand."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    joined: list[int] = []
    for text in stored_texts(store):
        joined += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = ConcatRows(store, 128)
    assert len(rows) == len(joined) // 128
    for i in range(50):
        assert rows[i].tokens.tolist() == joined[128 * i : 128 * i + 128]


def test_the_manifest_records_inputs_and_outputs(corpus: Path, store: TokenStore, tokenizer_dir: Path) -> None:
    manifest = store.manifest
    assert manifest.dtype == "<u2"
    assert (manifest.tokenizer.eos_token, manifest.tokenizer.eos_id) == ("</s>", 2)
    assert (manifest.tokenizer.bos_token, manifest.tokenizer.bos_id) == ("<s>", 1)
    assert sum(source.counts["documents"] for source in manifest.sources) == 501
    assert len(manifest.splits["train"]) > 1
    for name in ("b.jsonl.zst", "c.jsonl.gz", "d.txt"):
        (source,) = [source for source in manifest.sources if source.path.endswith(name)]
        assert source.stop == (corpus / name).stat().st_size
        assert source.sha256 == hashlib.sha256((corpus / name).read_bytes()).hexdigest()
    assert manifest.split_rule["validation_share"] == 0.2
    assert set(manifest.versions) == {"python", "gigatoken", "tokenizers", "transformers"}


def test_a_document_can_be_traced_to_its_line(store: TokenStore) -> None:
    view = store.split("validation")
    origins = {text.split(" ")[0]: view.origin(doc_id) for doc_id, text in enumerate(stored_texts(view))}
    numbers = [name.removeprefix("1-") for name in origins if name.startswith("1-")]
    assert numbers
    for number in numbers:
        assert origins[f"1-{number}"].endswith(f"b.jsonl.zst: record {int(number) + 1}")


def test_the_store_has_a_copy_of_its_tokenizer(store: TokenStore, tokenizer_dir: Path) -> None:
    check_tokenizer(store, tokenizer_dir)
    check_tokenizer(store, store.tokenizer_path)
    check_tokenizer(store, AutoTokenizer.from_pretrained(store.tokenizer_path))
    assert AutoTokenizer.from_pretrained(store.tokenizer_path).model_max_length == 512


def test_another_tokenizer_is_refused(store: TokenStore, tokenizer_dir: Path) -> None:
    other = AutoTokenizer.from_pretrained(tokenizer_dir)
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="tokenized with another tokenizer"):
        check_tokenizer(store, other)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_held_out_share_is_about_the_requested_one(tmp_path: Path, tokenizer_dir: Path, share: float) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(4000)])
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=share)
    got = store.split("validation").num_documents / 4000
    assert abs(got - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_adding_documents_moves_no_other_between_the_splits(tmp_path: Path, tokenizer_dir: Path) -> None:
    old = [{"text": f"document {i}"} for i in range(300)]
    new = [{"text": f"new {i}"} for i in range(300)]
    mixed = [record for pair in zip(new, old, strict=True) for record in pair]
    held_out = []
    for name, content in (("old", old), ("mixed", mixed)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", content)
        store = tokenize_files([path], tokenizer_dir, tmp_path / name, validation_share=0.3)
        texts = (stored_texts(store), stored_texts(store.split("validation")))
        held_out.append([{text for text in split if text.startswith("document")} for split in texts])
    assert held_out[0] == held_out[1]


def test_splitting_by_a_field_keeps_documents_of_one_origin_together(tmp_path: Path, tokenizer_dir: Path) -> None:
    content = [{"text": f"{i % 40} {i}", "meta": {"source": f"repository {i % 40}"}} for i in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl", content)
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=0.4, split_field="meta.source")
    sides = [{text.split()[0] for text in stored_texts(split)} for split in (store, store.split("validation"))]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == 40
    assert min(map(len, sides)) > 5


def test_special_tokens_in_a_text_are_encoded_as_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "a </s> in the middle, <s> and <pad> too</s>"
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store")
    ids = store.tokens(0, store.num_tokens)
    assert stored_texts(store) == [text]
    assert (ids == store.eos_id).sum() == 1
    assert not np.isin(ids, [0, 1]).any()


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    corpus: Path, store: TokenStore, tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = tokenize_files([corpus], tokenizer_dir, tmp_path / "store", shard_mb=1, validation_share=0.2, workers=3)
    assert files_of(other.path) == files_of(store.path)


def test_the_shard_size_does_not_change_the_tokens(
    corpus: Path, store: TokenStore, tokenizer_dir: Path, tmp_path: Path
) -> None:
    other = tokenize_files([corpus], tokenizer_dir, tmp_path / "store", shard_mb=100, validation_share=0.2)
    assert len(other.manifest.splits["train"]) == 1 < len(store.manifest.splits["train"])
    assert (other.tokens(0, other.num_tokens) == store.tokens(0, store.num_tokens)).all()
    assert (other.doc_offsets == store.doc_offsets).all()
    assert (other.text_hashes() == store.text_hashes()).all()


def test_the_batch_size_does_not_change_the_tokens(
    corpus: Path, store: TokenStore, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARS", 1)
    other = tokenize_files([corpus], tokenizer_dir, tmp_path / "store", shard_mb=1, validation_share=0.2)
    assert files_of(other.path) == files_of(store.path)


KILLED = """
import os, signal, sys
from data_prep.tokenize import shards
from tests.data_prep.small_corpora import tokenize_files

whole = shards.tokenize_unit

def in_the_middle(unit, job, advance):
    def dies(read_bytes, text_bytes, tokens):
        if tokens and list(job.partial.glob("units/*.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        advance(read_bytes, text_bytes, tokens)
    whole(unit, job, dies)

shards.tokenize_unit = in_the_middle
tokenize_files([sys.argv[1]], sys.argv[2], sys.argv[3], shard_mb=1, validation_share=0.2)
"""


def test_a_killed_program_resumes_to_the_same_bytes(
    corpus: Path, store: TokenStore, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Kill it in the middle of its second shard; the first one must not be written again."""
    output = tmp_path / "store"
    arguments = [str(corpus), str(tokenizer_dir), str(output)]
    program = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert program.returncode == -signal.SIGKILL
    assert list(partial_path(output).glob("train/00001*")), "begun"
    with pytest.raises(ValueError, match="interrupted; run the same"):
        TokenStore(output)
    finished = next(partial_path(output).glob("train/*.tokens"))
    before = finished.stat().st_mtime_ns
    other = tokenize_files([corpus], tokenizer_dir, output, shard_mb=1, validation_share=0.2)
    assert files_of(other.path) == files_of(store.path)
    assert (other.path / "train" / finished.name).stat().st_mtime_ns == before
    assert not partial_path(output).exists()


def test_a_program_killed_before_the_last_rename_is_completed(
    corpus: Path, store: TokenStore, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize() -> TokenStore:
        return tokenize_files([corpus], tokenizer_dir, tmp_path / "store", shard_mb=1, validation_share=0.2)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.resume.move_store", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            tokenize()
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.tokenize.run.run_units", lambda *_: pytest.fail("nothing is left to tokenize"))
        assert files_of(tokenize().path) == files_of(store.path)


def test_an_error_in_one_file_keeps_the_shards_before_it(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", records(200))
    bad = write_jsonl(tmp_path / "b.jsonl", [*records(200, seed=3), "{"])
    with pytest.raises(ValueError, match="malformed JSON"):
        tokenize_files([tmp_path / "a.jsonl", bad], tokenizer_dir, tmp_path / "store", shard_mb=1)
    kept = list(partial_path(tmp_path / "store").glob("units/*.json"))
    assert kept
    assert not list(partial_path(tmp_path / "store").rglob("*.tmp"))


def test_a_repeated_request_does_nothing_and_a_different_one_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records(20))
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store")
    before = (store.path / "manifest.json").stat().st_mtime_ns
    tokenize_files([path], tokenizer_dir, tmp_path / "store")
    assert (store.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"exists with other content \(corpus.validation_share was 0.0, is 0.5\)"):
        tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=0.5)
    other = tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=0.5, overwrite=True)
    assert other.split("validation").num_documents > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "store"]


def test_leftovers_of_a_kill_right_after_replacing_a_store_are_removed(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records(20))
    first = files_of(tokenize_files([path], tokenizer_dir, tmp_path / "store").path)
    for share in (0.0, 0.5):
        shutil.copytree(tmp_path / "store", tmp_path / "store.replaced")
        store = tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=share, overwrite=True)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "store"]
        assert (files_of(store.path) == first) == (share == 0.0)


def test_a_folder_that_cannot_be_removed_does_not_hide_the_refusal(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate NFS, which renames a deleted open lock file, so that its directory cannot be removed."""
    bad = write_jsonl(tmp_path / "a.jsonl", ["{"])
    good = write_jsonl(tmp_path / "b.jsonl", records(5))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        with pytest.raises(ValueError, match="malformed JSON"):
            tokenize_files([bad], tokenizer_dir, tmp_path / "store")
    assert partial_path(tmp_path / "store").exists()
    assert tokenize_files([good], tokenizer_dir, tmp_path / "store").num_documents == 5


def test_a_partial_store_of_another_request_is_not_touched(tmp_path: Path, tokenizer_dir: Path) -> None:
    done = write_jsonl(tmp_path / "0.jsonl", records(200))
    bad = write_jsonl(tmp_path / "a.jsonl", ["{"])
    good = write_jsonl(tmp_path / "b.jsonl", records(5))
    with pytest.raises(ValueError, match="malformed"):
        tokenize_files([done, bad], tokenizer_dir, tmp_path / "store", shard_mb=1)
    with pytest.raises(ValueError, match=r"half written with other settings .*corpus.paths was"):
        tokenize_files([good], tokenizer_dir, tmp_path / "store")
    tokenize_files([good], tokenizer_dir, tmp_path / "store", overwrite=True)


def test_two_programs_cannot_write_the_same_store(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records(5))
    partial_path(tmp_path / "store").mkdir()
    with open(partial_path(tmp_path / "store") / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another program is writing this store"):
            tokenize_files([path], tokenizer_dir, tmp_path / "store")


def test_a_corpus_without_held_out_documents_is_reported(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    tokenize_files([path], tokenizer_dir, tmp_path / "store", validation_share=1e-9)
    assert "no document is held out, so this store cannot be used for evaluation" in caplog.text


def test_the_standard_library_round_trips(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = CorpusConfig(name="stdlib", source=CorpusSource.stdlib, validation_share=0.1)
    run(TokenizeVerb(corpus=corpus, tokenizer=TokenizerConfig(str(tokenizer_dir)), output=str(tmp_path / "store")))
    store = TokenStore(tmp_path / "store")
    assert store.split("validation").num_documents > 20
    for split in (store, store.split("validation")):
        for doc_id, text in list(enumerate(stored_texts(split, step=37))):
            doc_id *= 37
            assert text == Path(split.origin(doc_id).removesuffix(": record 1")).read_bytes().decode()


def test_encoding_agrees_with_hugging_face(tmp_path: Path, tokenizer_dir: Path, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    path = shared_data / "spec" / "spec-00000.jsonl.gz"
    with open_stream(path) as (content, _):
        texts = [json.loads(content.readline())["text"] for _ in range(5)]
    store = tokenize_files([path], tokenizer_dir, tmp_path / "store")
    for text, (_, start, stop) in zip(texts, store.documents(), strict=False):
        ids = store.tokens(start, stop).tolist()
        assert ids == [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text
