"""A tiny corpus and a tiny model, shared by the tests of whole runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_runs import ROOT, Launcher, environment


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """A token store of real Python sources: the `json`, `email` and `logging` packages of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    texts, library = folder / "texts", Path(os.__file__).parent
    texts.mkdir()
    for python in [*library.glob("json/*.py"), *library.glob("email/*.py"), *library.glob("logging/*.py")]:
        (texts / f"{python.parent.name}_{python.stem}.txt").write_text(python.read_text(encoding="utf-8"))
    source = [f"corpus.paths=[{texts}]", "corpus.name=tiny"]
    prepare = [sys.executable, "-m", "data_prep"]
    tokenizer, store = folder / "tokenizer", folder / "store"
    for verb in (
        ["train_tokenizer", *source, f"output={tokenizer}", "vocab_size=512"],
        ["tokenize", *source, f"tokenizer={tokenizer}", f"output={store}", "corpus.validation_share=0.2"],
    ):
        subprocess.run([*prepare, *verb], cwd=ROOT, env=environment(), check=True, timeout=120)
    return store


@pytest.fixture(scope="session")
def launcher(tmp_path_factory, tiny_store) -> Launcher:
    """Launches in one session folder, so that a finished run serves several tests."""
    folder = tmp_path_factory.mktemp("runs")
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    ).save_pretrained(folder / "architecture")
    return Launcher(folder, tiny_store)
