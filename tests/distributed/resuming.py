"""Train, stop and resume tiny runs through train.run; started by torchrun on any number of ranks.

    torchrun --nproc_per_node 2 tests/distributed/resuming.py FOLDER STORE ARCHITECTURE VERB,VERB,... NAME...

Each NAME of `CELLS` or `SHARING` goes through every VERB:

    whole       train to the end in FOLDER/<NAME>_whole
    part        train one step beyond the checkpoint of step 4 in FOLDER/<NAME>_from<ranks>, then stop without saving
    resume      resume a copy of a run stopped on <n> ranks, FOLDER/<NAME>_from<n>_to<ranks>
    exact       resume the run stopped on this number of ranks; write its differences from `whole` to FOLDER/<NAME>.json
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train  # noqa: E402
from clex_train.config.engine import EngineConfig  # noqa: E402
from clex_train.engine import deepspeed as engines  # noqa: E402
from clex_train.training import loop  # noqa: E402
from clex_train.utils import distributed  # noqa: E402
from clex_train.utils.errors import StopRequested  # noqa: E402
from tests.helpers.composing import composed  # noqa: E402

# Twelve rows a step allow accumulation 3 on one and two ranks, and three rows each on four ranks.
ROWS = 12
CELLS = {
    "zero3_accumulation_1": ("engine.zero_stage=3", "engine.accumulation=1", "engine.micro_batch=null"),
    "zero3_accumulation_3": ("engine.zero_stage=3", "engine.accumulation=3", "engine.micro_batch=null"),
    "zero2_accumulation_1": ("engine.zero_stage=2", "engine.accumulation=1", "engine.micro_batch=null"),
    "zero2_accumulation_3": ("engine.zero_stage=2", "engine.accumulation=3", "engine.micro_batch=null"),
    "zero1_decay": (
        "engine.zero_stage=1",
        "engine.accumulation=3",
        "engine.micro_batch=null",
        "optim.weight_decay=0.1",
    ),
    "zero3_offload": ("engine.zero_stage=3", "engine.offload=optimizer", "optim.weight_decay=0.1"),
    "zero2_offload": ("engine.zero_stage=2", "engine.offload=optimizer", "optim.weight_decay=0.1"),
    "zero0": ("engine.zero_stage=0", "optim.weight_decay=0.1"),
    "zero1": ("engine.zero_stage=1", "optim.weight_decay=0.1"),
    "zero2": ("engine.zero_stage=2", "optim.weight_decay=0.1"),
    "zero3": ("engine.zero_stage=3", "optim.weight_decay=0.1"),
    "zero2_adapter": ("engine.zero_stage=2", "adapter=longlora", "optim.weight_decay=0.1"),
    "zero3_adapter": ("engine.zero_stage=3", "adapter=longlora", "optim.weight_decay=0.1"),
    "zero3_adapter_dropout": (
        "engine.zero_stage=3",
        "adapter=lora",
        "adapter.dropout=0.1",
        "adapter.targets=[all-linear]",
    ),
    "zero3_bf16_dropout": ("engine.zero_stage=3", "engine.precision=bf16", "optim.weight_decay=0.1", "+dropout"),
}
TOGETHER = ("engine.accumulation=3", "engine.micro_batch=null", "optim.weight_decay=0.1")
SHARING = {"rows_shared": ("engine.sequence_parallel=2", *TOGETHER), "rows_alone": TOGETHER}
"""Runs with sequences sharded over two ranks, and the same steps on one."""
STEPS, STOP = 6, 4
COMPARED = ("loss", "lr", "t", "grad_norm", "ode_grad_norm", "rows")


def overrides(folder: Path, store: Path, architecture: Path, cell: str) -> tuple[str, ...]:
    """Configure six steps of CLEX with a checkpoint after every second and an evaluation after every third."""
    settings = [item for item in {**CELLS, **SHARING}.get(cell, ()) if item != "+dropout"]
    return (
        "+experiment=tiny_base",
        f"output_dir={folder}",
        f"data.path={store}",
        f"model.config={architecture}",
        "model.context_len=32",
        "data.seq_len=32",
        "scaling=clex",
        "scaling.lr_scale=1.0",
        "scaling.t_max=4",
        f"optim.batch_rows={ROWS}",
        f"optim.steps={STEPS}",
        "checkpoint.every=2",
        "checkpoint.keep_last=8",
        "evaluation.every=3",
        "evaluation.lengths=[32,64]",
        "evaluation.num_windows=1",
        "evaluation.methods=[trained]",
        "tracking.wandb=off",
        *settings,
    )


def with_dropout(architecture: Path, folder: Path) -> Path:
    """Copy the architecture with dropout on the attention weights."""
    settings = json.loads((architecture / "config.json").read_text())
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.2}))
    distributed.barrier()
    return folder


def train_whole(folder: Path, cell: str, given: Callable[[Path], tuple[str, ...]]) -> None:
    train.run(composed(*given(folder / f"{cell}_whole")))


def train_part(folder: Path, cell: str, given: Callable[[Path], tuple[str, ...]]) -> None:
    real = loop.train_step

    def stops(parts: Any, step: int, micro_batches: Any) -> dict[str, Any]:
        if step == STOP + 1:
            raise StopRequested("enough")
        return real(parts, step, micro_batches)

    loop.train_step = stops
    try:
        with suppress(StopRequested):
            train.run(composed(*given(folder / f"{cell}_from{distributed.world_size()}")))
    finally:
        loop.train_step = real


def resume_on_other_ranks(folder: Path, cell: str, given: Callable[[Path], tuple[str, ...]]) -> None:
    ranks = distributed.world_size()
    for left in sorted(folder.glob(f"{cell}_from?")):
        if left.name != f"{cell}_from{ranks}":
            target = folder / f"{left.name}_to{ranks}"
            if distributed.is_main():
                shutil.copytree(left, target)
            distributed.barrier()
            train.run(composed(*given(target)))


def resume_and_compare(folder: Path, cell: str, given: Callable[[Path], tuple[str, ...]]) -> None:
    parted = folder / f"{cell}_from{distributed.world_size()}"
    train.run(composed(*given(parted)))
    if distributed.is_main():
        uninterrupted = folder / f"{cell}_whole"
        report = {"different": differences(uninterrupted, parted), "compared": len(figures(uninterrupted))}
        (folder / f"{cell}.json").write_text(json.dumps(report))


VERBS = {"whole": train_whole, "part": train_part, "resume": resume_on_other_ranks, "exact": resume_and_compare}


def differences(first: Path, second: Path) -> list[str]:
    """Return the names of weights, metrics and evaluation figures that differ in any bit."""
    different = []
    for name in ("model.safetensors", "clex.safetensors", "frequencies.safetensors"):
        one, two = load_file(first / "final" / name), load_file(second / "final" / name)
        different += [key for key in one if key not in two or not torch.equal(one[key], two[key])]
    one, two = figures(first), figures(second)
    return different + [key for key in {**one, **two} if one.get(key) != two.get(key)]


def figures(folder: Path) -> dict[str, Any]:
    """Return every figure that does not depend on the clock, by `step key`."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        f"{row['step']} {key}": value
        for row in rows
        for key, value in row.items()
        if key in COMPARED or key.startswith("perplexity/")
    }


def main(folder: Path, store: Path, architecture: Path, verbs: str, cells: list[str]) -> None:
    """Run each cell in one process group, opened first because a barrier before that would not wait for other ranks."""
    engines.open_process_group(EngineConfig())
    for cell in cells:
        chosen = with_dropout(architecture, folder / "dropout") if "+dropout" in CELLS.get(cell, ()) else architecture
        for verb in verbs.split(","):
            VERBS[verb](folder, cell, lambda target: overrides(target, store, chosen, cell))  # noqa: B023
            distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
