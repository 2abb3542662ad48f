"""Real signals end the evaluate program at random moments; the same command ends with the same numbers."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clex_train.data.writer import write_store
from tests.evaluation.evaluation_models import VOCAB
from tests.evaluation.model_directories import save_model
from tests.helpers import environments

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)


@pytest.mark.slow
def test_a_program_that_is_killed_three_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 90, (4000,), generator=generator).tolist() for _ in range(4)]
    write_store(tmp_path / "store", {"train": documents, "validation": documents}, VOCAB)
    asked = ["model=base", "data=store", "lengths=[16,64,256]", "methods=[none,ntk]", "protocols=[one_shot,sliding]"]
    asked += ["stride=4", "num_windows=12", "chunk_len=32", "precision=fp32"]
    start = time.monotonic()
    assert _start(tmp_path, asked, "whole").wait() == 0
    lasts = time.monotonic() - start
    rng, codes = random.Random(0), []
    for number in SIGNALS:
        process = _start(tmp_path, asked, "x")
        # Not before the first cell is there: what comes earlier has nothing to lose.
        while process.poll() is None and not list(tmp_path.glob("x.*.partial")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, lasts / 8))
        process.send_signal(number)
        codes.append(process.wait())
        assert not list(tmp_path.glob("x.json"))
    process = _start(tmp_path, asked, "x")
    _, said = process.communicate()
    assert process.returncode == 0
    assert "of 12 cells found from an interrupted evaluation" in said
    assert codes[0] == -signal.SIGKILL
    found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("x", "whole")]
    for row in (*found[0]["scores"], *found[1]["scores"]):
        del row["seconds"]
    assert found[0]["scores"] == found[1]["scores"]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["whole.json", "x.json"]


def _start(folder: Path, asked: list[str], name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clex_train.cli.evaluate", *asked, f"output={name}.json"]
    return subprocess.Popen(command, cwd=folder, env=environments.of_a_launch(), stderr=subprocess.PIPE, text=True)
