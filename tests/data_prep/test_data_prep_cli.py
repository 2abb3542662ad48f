"""The command line of `python -m data_prep`: verbs, defaults, one-line errors and exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from clex_train.config.docs import describe
from clex_train.token_store.store import TokenStore
from data_prep import __main__ as program
from tests.data_prep.small_corpora import TEXTS, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the program in this process in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["data_prep", *arguments])
        code = program.main()
        return code, *capsys.readouterr()

    return call


def test_the_verbs_work_in_sequence_with_default_paths(run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "books" / "a.jsonl.zst", [{"text": f"{i} {text}"} for i in range(9) for text in TEXTS])
    for verb in (["train_tokenizer", "vocab_size=300"], ["tokenize"], ["corpus"]):
        code, _, errors = run(verb[0], "+corpus=local_books", *verb[1:])
        assert code == 0, errors
    assert sorted(p.name for p in (tmp_path / "corpora").iterdir()) == [
        "local_books",
        "local_books.jsonl.zst",
        "local_books_tokenizer",
    ]
    assert TokenStore("corpora/local_books").num_documents > 0
    code, report, _ = run("inspect", "store=corpora/local_books", "verify=true")
    assert code == 0
    assert "files verified" in report


def test_only_the_output_is_written(run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    run("corpus", "corpus.paths=[a.jsonl]", "output=b.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_non_utf8_file_names_work_in_every_verb(run, tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).write_text("a text")
    shutil.copy(folder / name, tmp_path / os.fsdecode(b"\xff.txt"))
    code, _, errors = run("tokenize", "corpus.paths=[names]", f"tokenizer={tokenizer_dir}", "output=store")
    assert code == 0, errors
    store = TokenStore("store")
    assert store.manifest.sources[0].path == f"names/{name}"
    assert Path(store.manifest.sources[0].path).read_text() == "a text"
    code, report, errors = run("inspect", "store=store", "verify=true")
    assert (code, "caf\\udce9.txt" in report) == (0, True), errors
    code, _, errors = run("corpus", "corpus.paths=[names]", "output=names.jsonl")
    assert code == 0, errors
    record = json.loads((tmp_path / "names.jsonl").read_bytes().decode("utf-8"))
    assert record == {"text": "a text", "meta": {"path": "names/caf\\xe9.txt"}}
    named = f'corpus.paths=["{os.fsdecode(bytes([255]))}.txt"]'
    code, _, errors = run("tokenize", named, f"tokenizer={tokenizer_dir}")
    assert code == 0, errors


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "corpus").glob("*.yaml")))
def test_every_corpus_file_composes_and_describes_itself(run, name: str) -> None:
    code, composed, _ = run("tokenize", f"+corpus={name}", "--cfg", "job")
    assert code == 0
    assert f"name: {name}" in composed
    assert (ROOT / "conf" / "corpus" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenise"], "tokenise: no such verb; use one of corpus, train_tokenizer, tokenize, chat, show, inspect"),
        (["tokenize", "+corpus=stdlibb"], "corpus=stdlibb: no such option; did you mean stdlib?"),
        (["tokenize", "corpus=stdlib"], "corpus: a corpus is added with a plus sign: +corpus=NAME"),
        (["tokenize", "+corpus=stdlib", "workerz=2"], "workerz: no such key; did you mean workers?"),
        (["tokenize", "+corpus=stdlib", "corpus.txt_field=a"], "corpus.txt_field: no such key"),
        (["tokenize", "+corpus=stdlib", "workers=many"], "workers=many: should be of type integer"),
        (["tokenize", "+corpus=stdlib", "workers=0"], "workers=0: at least 1 process"),
        (
            ["tokenize", "+corpus=stdlib", "corpus.validation_share=2"],
            "corpus.validation_share=2.0: must be a share in",
        ),
        (["tokenize", "+corpus=stdlib", "shard_mb=0"], "shard_mb=0: at least 1 megabyte"),
        (["tokenize"], "corpus.paths=[]: nothing to read; add +corpus=NAME"),
        (["tokenize", "corpus.paths=[nowhere.jsonl]"], "corpus.paths=nowhere.jsonl: no such file"),
        (["inspect"], "store: name the directory of a token store"),
        (["inspect", "store=nowhere"], "nowhere: no such directory"),
        (["inspect", "store=x", "workers=2"], "workers: no such key"),
    ],
)
def test_wrong_input_gives_one_line_and_exit_code_2(run, arguments: list[str], message: str) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert message in errors


@pytest.mark.parametrize("verb", sorted(program.VERBS))
def test_help_describes_every_key_of_the_verb(run, verb: str) -> None:
    code, text, _ = run(verb, "--help")
    assert code == 0
    for key, _, _, meaning in describe(program.VERBS[verb][0]):
        assert f"  {key}=" in text
        assert meaning in text
    if verb != "inspect":
        assert "stdlib" in text


def test_help_without_a_verb_lists_the_verbs(run) -> None:
    for arguments in ([], ["--help"]):
        code, text, _ = run(*arguments)
        assert code == 0
        assert all(verb in text for verb in program.VERBS)


def test_a_bad_line_found_by_a_worker_is_reported_in_one_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Start a real process with workers, so that the error has to cross two processes."""
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl.gz", [{"text": "x" * 1_200_000}, "{" if name == "b" else {"text": "y"}])
    arguments = [f"corpus.paths=[{tmp_path}]", f"tokenizer={tokenizer_dir}", f"output={tmp_path}/store"]
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "z"}\n' * 100_000)
    command = [sys.executable, "-m", "data_prep", "tokenize", *arguments, "workers=2", "shard_mb=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr.splitlines()[-1]
    assert "b.jsonl.gz: line 2: malformed JSON" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_workers_do_not_import_torch() -> None:
    """Keep workers of `tokenize` and `decontaminate` quick to start: importing torch takes seconds in each."""
    modules = ["data_prep.tokenize.shards", *(module for _, module in program.VERBS.values())]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
