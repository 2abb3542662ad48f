"""Partial results of evaluations: bitwise resuming, and never from another evaluation."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.evaluation import partial_results
from clex_train.evaluation.methods import tables
from clex_train.evaluation.partial_results import Partial, resume
from clex_train.evaluation.protocols import Reading, readings
from clex_train.evaluation.results import Results, Score
from clex_train.evaluation.runner import evaluate
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows

LENGTHS = [16, 32, 64]
PROTOCOLS = [Protocol.one_shot, Protocol.chunked, Protocol.per_position]
READINGS = readings(EvaluationConfig(lengths=LENGTHS, protocols=PROTOCOLS), CONTEXT_LEN)
METHODS = (Method.none, Method.ntk)
FACTS = {"weights": "a", "num_windows": 3}


class Killed(BaseException):
    """End the process at a forward."""


class Model:
    """Count the forwards of the tiny Llama and end the process at one of them."""

    def __init__(self) -> None:
        self.model = build_tiny_llama()
        self.handle = install_rotary(self.model, CONTEXT_LEN)
        self.forwards, self.last = 0, None
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.forwards == self.last:
            raise Killed
        self.forwards += 1

    def run(
        self,
        kept: Partial | None = None,
        last: int | None = None,
        todo: Sequence[Reading] = READINGS,
        methods: Sequence[Method] = METHODS,
        **settings: int,
    ) -> Results:
        """Evaluate for at most `last` forwards."""
        self.forwards, self.last = 0, last
        longest = max(todo[0].spans)
        chosen = tables(methods, base_rope(self.handle), longest)
        windows, cpu = random_windows(settings.get("windows", 3), longest), torch.device("cpu")
        size = settings.get("chunk_len", 20)
        return evaluate(self.model, self.handle, chosen, windows, todo, size, device=cpu, kept=kept)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture
def _keep_every_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Save every batch, and not only those worth the time of a write."""
    monkeypatch.setattr(partial_results, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(partial_results, "WRITES", 0)
    return


def numbers(results: Results) -> list[Score]:
    """Return the scores without their durations."""
    return [replace(score, seconds=0.0) for score in results.scores]


@pytest.mark.usefixtures("_keep_every_batch")
def test_a_kill_at_any_forward_costs_at_most_a_batch_and_resumes_bitwise(model, tmp_path) -> None:
    whole = model.run()
    forwards = model.forwards
    for killed_at in range(1, forwards, 9):
        file = tmp_path / f"{killed_at}.json"
        with pytest.raises(Killed):
            model.run(resume(file, FACTS), killed_at)
        spent = model.forwards
        results = model.run(resume(file, FACTS))
        spent += model.forwards
        assert numbers(results) == numbers(whole)
        # A batch is at most four chunks of a window of 64 tokens, plus the forward that probes the output layer.
        assert spent <= forwards + 4 + 1


@pytest.mark.usefixtures("_keep_every_batch")
def test_kills_while_writing_the_file_cost_at_most_a_batch(model, tmp_path, monkeypatch) -> None:
    whole, file = model.run(), tmp_path / "x.json"
    replaced, calls = os.replace, []

    def kill(source: str, target: Path) -> None:
        calls.append(target)
        if len(calls) % 4 == 0:
            raise Killed
        replaced(source, target)

    monkeypatch.setattr(os, "replace", kill)
    for _ in range(100):
        try:
            results = model.run(resume(file, FACTS))
            break
        except Killed:
            continue
    assert numbers(results) == numbers(whole)
    assert len(calls) > 8


def test_finished_cells_are_reported_and_not_recomputed(model, tmp_path, caplog) -> None:
    kept = resume(tmp_path / "x.json", FACTS)
    whole = model.run(kept)
    with caplog.at_level("INFO", logger="clex_train"):
        again = resume(tmp_path / "x.json", FACTS)
        partial_results.log_found(again, 18)
    assert f"18 of 18 cells found from an interrupted evaluation ({kept.path})" in caplog.text
    results = model.run(again, last=1)
    assert numbers(results) == numbers(whole)
    assert model.forwards == 1, "the one that looks at the output layer"
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_results_of_other_settings_are_reported_and_not_used(model, tmp_path, caplog) -> None:
    file = tmp_path / "x.json"
    model.run(resume(file, FACTS))
    with caplog.at_level("INFO", logger="clex_train"):
        other = resume(file, {**FACTS, "weights": "b"})
    assert other.cells == {}
    [line] = [record.getMessage() for record in caplog.records]
    assert "is from an interrupted evaluation with other weights and is not used; repeat that command" in line
    other.finish({"cell": 1})
    assert len(resume(file, FACTS).cells) == 18, "both are kept"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"format": 1}', '{"format": 1, "facts": {}, "cells": 3, "pieces": 0}']
)
def test_a_damaged_file_is_reported_and_replaced(tmp_path, caplog, content: str) -> None:
    kept = resume(tmp_path / "x.json", FACTS)
    kept.path.write_text(content)
    with caplog.at_level("INFO", logger="clex_train"):
        assert resume(tmp_path / "x.json", FACTS).cells == {}
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{kept.path} is damaged"]
    kept.finish({"cell": 1})
    assert resume(tmp_path / "x.json", FACTS).cells == {"cell": 1}


def test_a_partial_file_that_is_a_pipe_or_a_link_is_not_read(tmp_path, caplog) -> None:
    folder, outside = tmp_path / "evaluation", tmp_path / "outside"
    kept = resume(folder / "x.json", FACTS)
    kept.finish({"cell": 1})
    assert kept.path is not None
    kept.path.rename(outside)
    os.mkfifo(kept.path)
    assert resume(folder / "x.json", FACTS).cells == {}
    kept.path.unlink()
    kept.path.symlink_to(outside)
    again = resume(folder / "x.json", FACTS)
    assert again.cells == {}
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{kept.path} is damaged"] * 2
    again.finish({"cell": 2})
    assert resume(folder / "x.json", FACTS).cells == {"cell": 2}


def test_ill_typed_cells_and_pieces_are_recomputed(model, tmp_path) -> None:
    kept, whole = resume(tmp_path / "x.json", FACTS), model.run()
    kept.finish({"perplexity/none/one_shot/16": {"method": 3}, "perplexity/none/chunked/16": None})
    keys = [f"perplexity/none/{protocol.value}/16" for protocol in PROTOCOLS]
    kept.keep("+".join(keys), {"batches": "many", "nll": "?"})
    results = model.run(resume(tmp_path / "x.json", FACTS))
    assert numbers(results) == numbers(whole)


def test_a_full_disk_is_reported_once_and_the_evaluation_continues(model, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    results = model.run(resume(tmp_path / "x.json", FACTS))
    assert len(results.scores) == 18
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "cannot be written (No space left on device)" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_cells_equal_by_definition_are_computed_once_and_marked(model) -> None:
    results = model.run()
    both = model.forwards
    of_none, of_ntk = ([score for score in results.scores if score.method == name] for name in ("none", "ntk"))
    for mine, theirs in zip(of_ntk, of_none, strict=True):
        assert theirs.copied_from == ""
        assert mine.copied_from == (theirs.key if mine.length <= CONTEXT_LEN else "")
        assert (mine.window_nll == theirs.window_nll) == (mine.length <= CONTEXT_LEN)
    assert {score.frequencies for score in of_ntk} == {"ntk"}
    alone = Model()
    chosen = tables([Method.ntk], base_rope(alone.handle), max(LENGTHS))
    windows = random_windows(3, max(LENGTHS))
    apart = evaluate(alone.model, alone.handle, chosen, windows, READINGS, 20, device=torch.device("cpu"))
    assert [score.window_nll for score in apart.scores] == [score.window_nll for score in of_ntk]
    # Both methods probe the output layer once, and the 12 windows of 16 tokens are not read again.
    assert both == 2 * (alone.forwards - 1) + 1 - 12


def test_the_progress_bar_advances_with_every_chunk(model, monkeypatch) -> None:
    from clex_train.utils import progress

    moves: list[tuple[int, float]] = []
    make = progress.bar

    def watched(*args: object, **settings: object):
        bar = make(*args, **settings)
        update = bar.update
        monkeypatch.setattr(bar, "update", lambda n: (moves.append((model.forwards, n)), update(n))[1])
        return bar

    monkeypatch.setattr(progress, "bar", watched)
    model.run()
    assert {forwards for forwards, moved in moves if moved > 0} == set(range(2, model.forwards + 1))


@pytest.mark.slow
def test_two_interrupts_in_twelve_cells_cost_at_most_5_percent_more_forwards(model, tmp_path, monkeypatch) -> None:
    """Save parts at the default interval, on a clock where a forward takes 20 ms and a write 10 ms."""
    writes, write = [], partial_results.write_atomically
    monkeypatch.setattr(
        partial_results, "time", SimpleNamespace(monotonic=lambda: 0.02 * model.forwards + 0.01 * len(writes))
    )
    monkeypatch.setattr(partial_results, "write_atomically", lambda *args: (writes.append(args), write(*args)))
    spec = EvaluationConfig(lengths=[32, 128, 512], protocols=[Protocol.one_shot, Protocol.chunked])
    asked = {"todo": readings(spec, CONTEXT_LEN), "methods": (Method.ntk, Method.pi), "windows": 8, "chunk_len": 64}
    whole = model.run(**asked)
    undisturbed, spent = model.forwards, 0
    assert len(whole.scores) == 12
    for last in (undisturbed * 2 // 5, undisturbed * 2 // 5):
        with pytest.raises(Killed):
            model.run(resume(tmp_path / "x.json", FACTS), last, **asked)
        spent += model.forwards
    results = model.run(resume(tmp_path / "x.json", FACTS), **asked)
    assert numbers(results) == numbers(whole)
    assert spent + model.forwards <= 1.05 * undisturbed


def test_two_ranks_resume_bitwise_at_the_same_place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(_rank_main, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["resumed"] == first["whole"]
    assert first["spent"] <= first["forwards"] + 4 + 1
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == [first["file"]]


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    partial_results.LEAST_SECONDS, partial_results.WRITES = 0.0, 0
    model, file = Model(), Path(folder) / "x.json"
    found: dict[str, object] = {"whole": [score.window_nll for score in model.run().scores]}
    found["forwards"] = model.forwards
    kept = resume(file, FACTS)
    try:
        model.run(kept, last=9)
    except Killed:
        spent = model.forwards
    torch.distributed.barrier()
    found["resumed"] = [score.window_nll for score in model.run(resume(file, FACTS)).scores]
    found |= {"spent": spent + model.forwards, "file": kept.path.name if kept.path else ""}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
