"""Signals at random moments of evaluations: repeating the command gives the same numbers.

INTERRUPT_TRIALS=30 python -m pytest -m slow -s tests/evaluation/test_evaluations_interrupted.py
"""

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import VOCAB
from tests.evaluation.model_directories import save_model
from tests.harness.lm_eval_tasks import GENERATION, needs_harness, save_number_model, write_documents
from tests.helpers.interrupting import SEED, TRIALS, Interrupter, Trial, report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200 + 240 * TRIALS)]


def moments(output: Path, lasts: float, generator: random.Random) -> dict[str, Callable[[Any], None]]:
    """Return functions that wait for the moment of a signal: at the start, after a saved part, or around the end."""

    def has_saved_part() -> int:
        return sum(path.stat().st_mtime_ns for path in output.parent.glob(f"{output.stem}.*.partial"))

    def starting(process: Any) -> None:
        time.sleep(generator.uniform(0, lasts))

    def evaluating(process: Any) -> None:
        before = has_saved_part()
        while process.poll() is None and has_saved_part() in (0, before):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, lasts / 6))

    def ending(process: Any) -> None:
        while process.poll() is None and not output.exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.3))

    return {"starting": starting, "evaluating": evaluating, "evaluating again": evaluating, "ending": ending}


def interrupt(folder: Path, command: list[str], numbers: Callable[[Path], Any], *found: str) -> list[Trial]:
    """Interrupt evaluations until there were enough signals; all must end with the undisturbed numbers."""
    generator, trials, log = random.Random(SEED), [], folder / "log"
    outputs = folder / "outputs"
    outputs.mkdir()
    whole, start = folder / "whole.json", time.monotonic()
    Interrupter([*command, f"output={whole}"], whole, log, {}, generator).finish()
    lasts, goes_on = time.monotonic() - start, 0
    while len(trials) < TRIALS:
        output = outputs / f"x{len(trials)}.json"
        run = Interrupter([*command, f"output={output}"], output, log, moments(output, lasts, generator), generator)
        run.run(TRIALS - len(trials))
        trials += run.trials
        was_kept = bool(list(outputs.glob("*.partial")))
        said = run.finish()
        said_so = any(text in said for text in found)
        # A finished cell stays when the file of answers has gone, so it may be found after the end too.
        assert said_so == was_kept or (said_so and len(found) > 1), said
        goes_on += was_kept
        assert numbers(output) == numbers(whole)
        assert {path.suffix for path in outputs.iterdir()} <= {".json", ".md", ".cells"}, "no partial file is left"
    report(trials)
    assert goes_on > 0 or TRIALS < 4, "no evaluation was interrupted after it had kept something"
    return trials


def check_ends(trials: list[Trial]) -> None:
    """Assert the documented exit codes, no traceback and no orphans."""
    for trial in trials:
        assert "Traceback" not in trial.output, trial.output
        assert trial.orphans == [], trial.orphans
        ended_by = -signal.SIGKILL if trial.number is signal.SIGKILL else 128 + trial.number
        assert trial.code in (0, ended_by), (trial.number, trial.moment, trial.code, trial.output)


def test_interrupted_evaluations_end_with_the_same_numbers(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 90, (4000,), generator=generator).tolist() for _ in range(4)]
    write_store(tmp_path / "store", {"train": documents, "validation": documents}, VOCAB)
    asked = [f"model={tmp_path / 'base'}", f"data={tmp_path / 'store'}", "lengths=[16,64,256]", "methods=[none,ntk]"]
    asked += ["protocols=[one_shot,sliding]", "stride=4", "num_windows=6", "chunk_len=32", "precision=fp32"]

    def numbers(path: Path) -> dict[str, Any]:
        content = json.loads(path.read_text())
        for row in content["scores"]:
            del row["seconds"]
        return {key: content[key] for key in ("metrics", "scores", "windows", "request", "model", "data")}

    command = [sys.executable, "-m", "clex_train.cli.evaluate", *asked]
    check_ends(interrupt(tmp_path, command, numbers, "of 12 cells found from an interrupted evaluation"))


@needs_harness
def test_interrupted_lm_eval_tasks_end_with_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    save_number_model(tmp_path / "model")
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, VOCAB, (50,), generator=draw).tolist() for _ in range(120)]
    write_documents(tmp_path / "tasks", GENERATION, [(prompt, [5]) for prompt in prompts])
    asked = [f"model={tmp_path / 'model'}", "tasks=[continued_numbers]", f"include={tmp_path / 'tasks'}"]

    def numbers(path: Path) -> dict[str, Any]:
        content = json.loads(path.read_text())
        return {key: content[key] for key in ("metrics", "lm_eval", "request", "model", "data", "frequencies")}

    command = [sys.executable, "-m", "clex_train.cli.lm_eval", *asked, "precision=fp32"]
    check_ends(
        interrupt(tmp_path, command, numbers, "found from an interrupted evaluation", "1 of 1 cells are finished")
    )
