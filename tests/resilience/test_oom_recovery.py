"""Out-of-memory cells: reported and skipped on every rank, while the evaluation continues."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from clex_train.attention import kv_cache
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.evaluation.methods import tables
from clex_train.evaluation.protocols import readings
from clex_train.evaluation.results import Origin, Results, read, write
from clex_train.evaluation.runner import evaluate
from clex_train.evaluation.tables import console, from_results
from clex_train.resilience import oom_recovery
from clex_train.resilience.oom_recovery import MemoryGuard
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from clex_train.utils.errors import RunStopped
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows
from tests.helpers.warm_processes import call_on_two_ranks

METHODS, PROTOCOLS = (Method.none, Method.ntk), [Protocol.one_shot, Protocol.chunked]
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."


def results_with_room_for(most: int) -> Results:
    """Evaluate lengths 16, 32 and 64; a forward that takes the cache beyond `most` tokens runs out of memory."""
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)

    def fill_up(_: object, args: object, inputs: dict) -> None:
        cache = kv_cache.find_in_call((), inputs)
        if cache is not None and cache.get_seq_length() + inputs["input_ids"].shape[1] > most:
            raise torch.OutOfMemoryError(SAID)

    model.register_forward_pre_hook(fill_up, with_kwargs=True)
    chosen = tables(METHODS, base_rope(handle), 64)
    asked = readings(EvaluationConfig(lengths=[16, 32, 64], protocols=PROTOCOLS), CONTEXT_LEN)
    return evaluate(model, handle, chosen, random_windows(3, 64), asked, chunk_len=10, device=torch.device("cpu"))


def test_cells_out_of_memory_are_missing_with_a_reason_and_the_rest_is_unchanged(caplog, tmp_path: Path) -> None:
    whole = results_with_room_for(64).metrics()
    with caplog.at_level(logging.WARNING, logger="clex_train"):
        found = results_with_room_for(40)
    assert found.metrics() == {key: value for key, value in whole.items() if not key.endswith("/64")}
    assert len(whole) == len(found.metrics()) + len(found.missing) == 12
    assert sorted((cell.method, cell.protocol, cell.length) for cell in found.missing) == [
        (method, protocol, 64) for method in ("none", "ntk") for protocol in ("chunked", "one_shot")
    ]
    assert {cell.reason for cell in found.missing} == {f"rank 0: {SAID}"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert "skipping method ntk, protocol chunked, 64 tokens" in " ".join(lines)
    assert all("offload_cache=true" in line and "chunk_len" in line for line in lines)

    write(tmp_path / "x.json", found, Origin("x", [], {}, {}))
    assert read(tmp_path / "x.json")[0].missing == found.missing


def test_a_table_marks_rows_that_ran_out_of_memory() -> None:
    found = results_with_room_for(40)
    partly = Results(
        [score for score in results_with_room_for(64).scores if score.method == "none" or score.length < 64],
        found.context_len,
        found.windows,
        missing=[cell for cell in found.missing if cell.method == "ntk"],
    )
    printed = console(from_results(partly, Origin("x", [], {}, {})))
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith("ntk")] == ["OOM", "OOM"]
    assert "out of memory (OOM): ntk, one_shot at 64, ntk, chunked at 64" in " ".join(printed.split())


def exceed_host_memory() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def test_only_memory_errors_of_device_or_host_count() -> None:
    cell = MemoryGuard(build_tiny_llama(), "a cell")
    assert cell.attempt(lambda: torch.ones(1)) is not None
    assert cell.shortage() == ""
    assert cell.attempt(exceed_host_memory) is None
    assert cell.attempt(lambda: pytest.fail("tried again")) is None
    assert "memory" in cell.shortage()
    with pytest.raises(RuntimeError, match="size of tensor a"):
        MemoryGuard(build_tiny_llama(), "a cell").attempt(lambda: torch.ones(2) + torch.ones(3))


def test_memory_of_a_failed_forward_is_released() -> None:
    from weakref import ref

    made = []

    def work() -> torch.Tensor:
        hidden = torch.ones(1000)
        made.append(ref(hidden))
        return hidden + exceed_host_memory()

    MemoryGuard(build_tiny_llama(), "a cell").attempt(work)
    assert made[0]() is None


def test_a_rank_with_sharded_weights_stops_the_run_when_out_of_memory(monkeypatch) -> None:
    monkeypatch.setattr(oom_recovery.distributed, "world_size", lambda: 2)
    model = build_tiny_llama()
    assert MemoryGuard(model, "a cell").attempt(exceed_host_memory) is None
    model.lm_head.weight.ds_id = 0
    with pytest.raises(RunStopped, match=r"out of memory: a cell \(rank 0: .*sharded=true on more ranks"):
        MemoryGuard(model, "a cell").attempt(exceed_host_memory)


def test_ranks_agree_on_the_cells_that_one_of_them_cannot_fit(tmp_path: Path) -> None:
    call_on_two_ranks(_rank_main, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [cell[2:] for cell in first["missing"]] == [[64, f"rank 1: {SAID}"]] * 4
    expected = {key: value for key, value in results_with_room_for(64).metrics().items() if not key.endswith("/64")}
    assert first["metrics"] == pytest.approx(expected, rel=1e-6)


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = results_with_room_for(40 if rank == 1 else 64)
    content = {"metrics": found.metrics(), "missing": [list(vars(cell).values()) for cell in found.missing]}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()
