"""Tokenizing one document of 200 MB in bounded memory, through the real program."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from clex_train.token_store.store import TokenStore

ROOT = Path(__file__).resolve().parents[2]
MAX_GIB = 1.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_document_of_200_mb_in_less_than_one_and_a_half_gib(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Tokenize one line of a .jsonl file; the reference is one block encoded by `tokenizers`, repeated."""
    block = (
        "Chapter one — “It\u2019s said”, they cried.\n"
        + (ROOT / "docs" / "data.md").read_text(encoding="utf-8").strip()
    )
    block += "\n"
    repeats = 200_000_000 // len(block.encode())
    with open(tmp_path / "long.jsonl", "wb") as file:
        escaped = block.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").encode()
        file.write(b'{"text": "')
        for _ in range(repeats):
            file.write(escaped)
        file.write(b'"}\n')
    command = [sys.executable, "-m", "data_prep", "tokenize", f"corpus.paths=[{tmp_path}/long.jsonl]"]
    command += [f"tokenizer={tokenizer_dir}", f"output={tmp_path}/store", "corpus.validation_share=0"]
    with subprocess.Popen(command, cwd=ROOT) as program:
        _, status, usage = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
    assert program.returncode == 0
    assert usage.ru_maxrss / 2**20 < MAX_GIB
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ids = np.array(tokenizer.encode(block, add_special_tokens=False).ids)
    store = TokenStore(tmp_path / "store")
    assert store.num_tokens == repeats * len(ids) + 1
    stored = store.tokens(0, store.num_tokens - 1).reshape(repeats, len(ids))
    assert (stored == ids[None]).all()
