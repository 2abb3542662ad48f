"""Benchmark the memory of a training step on a CPU, measured and estimated by the plan, with and without savers.

    python benchmarks/bench_memory.py [--output benchmarks/results/NAME.md] [--only CASE ...]

A separate process for each case builds a Llama with random weights under ZeRO-3 and CLEX as train.py does, takes
steps of `training.loop.train_step` on random rows, and reports the peak of its resident set during the last step above
that after imports. The estimate is that of the plan for the same configuration.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """Sizes of a float32 Llama with untied embeddings, and the length of its row."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    key_heads: int = 4
    intermediate: int = 1408
    vocab: int = 32768
    tokens: int = 2048


@dataclass(frozen=True)
class Case:
    """Options of `engine` to measure, and their label in the results."""

    name: str
    options: dict[str, Any]
    shape: Shape = Shape()
    steps: int = 2
    """Number of steps; the last one is measured."""


LONG = Shape(layers=2, width=256, heads=4, key_heads=2, intermediate=688, tokens=16384)
"""Row length at which float32 logits take 2 GiB, three times over in a plain loss."""

RECOMPUTED = {"activation_checkpointing": True}
CASES = (
    Case("plain", {}),
    Case("recomputed", RECOMPUTED),
    Case("inputs on the host", RECOMPUTED | {"offload_activations": True}),
    Case("tiled loss", {"tiled_loss": 512}),
    Case("tiled loss and MLP", {"tiled_loss": 512, "tiled_mlp": 512}),
    Case("recomputed, tiled loss and MLP", RECOMPUTED | {"tiled_loss": 512, "tiled_mlp": 512}),
    Case("optimizer offloaded", {"offload": "optimizer"}),
    Case("optimizer offloaded, recomputed, tiled", RECOMPUTED | {"offload": "optimizer", "tiled_loss": 512}),
    Case("16k row", RECOMPUTED, LONG, steps=1),
    Case("16k row in tiles", RECOMPUTED | {"tiled_loss": 512, "tiled_mlp": 2048}, LONG, steps=1),
)
WHOLE, TILED = "16k row", "16k row in tiles"


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""One thread, since each has its own buffers. Freed tensors of 1 MiB or more return to the system; by default glibc
keeps those below 32 MiB, which would count in the resident set."""


@dataclass(frozen=True)
class Measured:
    """Bytes of one case."""

    case: Case
    estimated: float
    moment: str
    grown: int
    loss: float

    @property
    def ratio(self) -> float:
        """Return the ratio of estimate to measurement."""
        return self.estimated / self.grown


def main() -> None:
    """Measure, print one Markdown page, and write it to `--output`."""
    from bench_page import publish

    arguments = parse()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    found = [measure(case) for case in chosen]
    publish(page(found), arguments.output)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES], help="measure these alone")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def measure(case: Case) -> Measured:
    """Estimate one case in this process and measure it in a subprocess."""
    # Late imports: the child must not import what it does not measure.
    from clex_train.preflight import memory_plan as planning
    from clex_train.preflight.run_checks import Scope, run_checks

    with tempfile.TemporaryDirectory() as folder:
        write_architecture(Path(folder), case.shape)
        ready = run_checks(configuration(Path(folder), case.shape, case.options), Scope.plan)
        plan = planning.make_plan(ready)
        words = json.dumps(
            {"folder": folder, "shape": asdict(case.shape), "options": case.options, "steps": case.steps}
        )
        command = [sys.executable, __file__, words]
        # The allocator reads its settings when the process starts.
        environment = {**os.environ, **ENVIRONMENT, "BENCH_MEMORY_CHILD": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # The last line, because DeepSpeed logs to stdout before it.
    said = json.loads(done.stdout.splitlines()[-1])
    return Measured(case, plan.peak, planning.MOMENTS[plan.totals().index(plan.peak)], said["grown"], said["loss"])


def write_architecture(folder: Path, shape: Shape) -> None:
    """Write the config.json of the model."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        # Fixed, so that CLEX draws the same t for rows of any length.
        max_position_embeddings=2048,
    ).save_pretrained(folder)


def configuration(folder: Path, shape: Shape, options: dict[str, Any]) -> Any:
    """Return the config of a CLEX run with one row per step."""
    from clex_train.config.engine import EngineConfig, Offload
    from clex_train.config.evaluation import EvaluationConfig
    from clex_train.config.method import Method
    from clex_train.config.model import Init, ModelConfig
    from clex_train.config.optim import OptimConfig
    from clex_train.config.root import Config
    from clex_train.config.scaling import ScalingConfig

    offload = Offload(options.get("offload", "none"))
    config = Config(
        model=ModelConfig(init=Init.random, config=str(folder)),
        scaling=ScalingConfig(name=Method.clex, t_max=16.0),
        engine=EngineConfig(**{**options, "offload": offload}),
        optim=OptimConfig(batch_rows=1, steps=10),
        evaluation=EvaluationConfig(every=-1),
    )
    config.data.seq_len = shape.tokens
    return config


def child(words: dict[str, Any]) -> None:
    """Run one case; print the growth of the resident set in the last step, and its loss."""
    import torch

    from clex_train.engine import deepspeed as engines
    from clex_train.models import architecture, load, memory_options
    from clex_train.training import loop
    from clex_train.training.ode_optimizer import OdeOptimizer
    from clex_train.training.state import Parts
    from clex_train.utils import distributed

    shape = Shape(**words["shape"])
    config = configuration(Path(words["folder"]), shape, words["options"])
    arch = architecture.to_train(config.model)
    engines.open_process_group(config.engine)
    # After the imports, whose memory has nothing to do with the step.
    before = status("VmRSS:")
    settings = engines.deepspeed_dict(config, distributed.world_size())
    loaded = load.load_for_training(config, arch, torch.float32, settings)
    memory_options.install(loaded.model, config.engine)
    assert loaded.clex is not None
    engine = engines.build(loaded.model, config)
    nothing: Any = None
    ode = OdeOptimizer(loaded.clex, config.scaling, config.seed)
    parts = Parts(config, engine, loaded, rows=nothing, ode=ode, checkpoints=nothing, evaluate=None)
    for step in range(words["steps"]):
        # Measure only the step, because building the model briefly needs all weights.
        Path("/proc/self/clear_refs").write_text("5")
        loss = loop.train_step(parts, step, iter([random_row(shape, step)]))["loss"]
        grown = status("VmHWM:") - before
    print(json.dumps({"grown": grown, "loss": loss}))


def random_row(shape: Shape, step: int) -> Any:
    """Build a micro batch of one row."""
    import torch

    from clex_train.data.batch import UNSCORED, MicroBatch

    ids = torch.randint(shape.vocab, (1, shape.tokens), generator=torch.Generator().manual_seed(step))
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=UNSCORED)
    # Seeded by the step, so that the loss in the results can be compared between versions.
    return MicroBatch(ids, targets, None, torch.tensor([step]))


def status(field: str) -> int:
    """Read a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def page(found: list[Measured]) -> list[str]:
    """Format the results in Markdown."""
    from bench_page import processor

    lines = [
        "# Memory of a training step, measured and estimated",
        "",
        f"- command: `python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`",
        f"- hardware: one virtual machine, {processor()}, {os.cpu_count()} cores; load average "
        f"{os.getloadavg()[0]:.1f} at the end",
        f"- software: Python {platform.python_version()}, torch {version('torch')}, transformers "
        f"{version('transformers')}, deepspeed {version('deepspeed')}; commit {commit()}",
        "- ZeRO-3 on one rank, float32, CLEX with random positions, AdamW; measured: the most that the resident set of "
        "a process of its own grew above that after imports, during its last step, under "
        + ", ".join(f"`{name}={value}`" for name, value in ENVIRONMENT.items()),
        f"- most cases: {Shape()}; rows of 16k: {LONG}",
        "",
        "| case | engine | estimate, MiB | at the moment of | measured, MiB | estimate / measured | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        options = ", ".join(f"{key}={value}" for key, value in each.case.options.items()) or "-"
        lines.append(
            f"| {each.case.name} | {options} | {each.estimated / MIB:.0f} | {each.moment} | {each.grown / MIB:.0f} "
            f"| {each.ratio:.3f} | {each.loss:.6f} |"
        )
    by_name = {each.case.name: each for each in found}
    if WHOLE in by_name and TILED in by_name:
        # The claim of the documentation, checked on every run.
        ratio = by_name[TILED].grown / by_name[WHOLE].grown
        lines += ["", f"A row of 16,384 tokens, vocabulary of 32,768: in tiles {ratio:.3f} of the peak without."]
    return lines


def commit() -> str:
    """Return the short commit of the checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    if "BENCH_MEMORY_CHILD" in os.environ:
        child(json.loads(sys.argv[1]))
    else:
        main()
