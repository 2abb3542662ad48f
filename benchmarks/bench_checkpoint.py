"""Benchmark checkpoints: seconds that training waits, seconds to write and to load, bytes against the minimum.

    python benchmarks/bench_checkpoint.py [--layers 20] [--rounds 3] [--output benchmarks/results/NAME.md]
    torchrun --nproc_per_node 2 benchmarks/bench_checkpoint.py ...

A Llama with random weights takes steps under ZeRO-3 and AdamW; in turn, a checkpoint is written by DeepSpeed alone, by
this project synchronously (`overlap=false`), and by it during the next steps (`overlap=true`). The minimum is the state
that AdamW needs to resume: a float32 weight and two float32 moments per parameter.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_page import processor, publish
from transformers import LlamaConfig, LlamaForCausalLM

from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.store import Checkpoints
from clex_train.checkpoint.writer import write
from clex_train.config.checkpoint import CheckpointConfig
from clex_train.config.optim import OptimConfig
from clex_train.config.root import Config
from clex_train.engine import deepspeed as engines
from clex_train.utils import distributed, log

LEAST = 12
"""Minimum bytes per parameter: a float32 weight and AdamW's two moments."""


def main() -> None:
    """Measure, print one Markdown page, and write it to `--output`."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    log.setup()
    config = Config(optim=OptimConfig(batch_rows=distributed.world_size()))
    engines.open_process_group(config.engine)
    # One folder for all ranks: ZeRO-3 writes a file per rank into the same checkpoint.
    folder = Path(distributed.broadcast_object(tempfile.mkdtemp(dir=arguments.folder)))
    try:
        lines = measure(arguments, config, folder)
    finally:
        # Other ranks may still be writing.
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder)
    if distributed.is_main():
        publish([*header(arguments), *lines], arguments.output)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64, help="of each rank's step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; by default the temporary folder")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, config: Config, folder: Path) -> list[str]:
    """Format the table of one model."""
    engine = build(arguments, config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    identity = Manifest.from_config(config, "benchmark", "benchmark")
    stores = {
        overlap: Checkpoints(folder / str(overlap), CheckpointConfig(keep_last=1, overlap=overlap), identity)
        for overlap in (False, True)
    }
    step(engine, arguments)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        distributed.barrier()
        started = time.perf_counter()
        result = action()
        distributed.barrier()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for number in range(1, arguments.rounds + 1):
        timed("step", lambda: step(engine, arguments))
        timed("deepspeed", lambda: save_by_deepspeed(engine, folder))
        timed("at once", lambda number=number: stores[False].save(engine, None, number, 0))
        timed("beside, blocked", lambda number=number: stores[True].save(engine, None, number, 0))
        while (written := stores[True].poll()) is None:
            timed("beside, step", lambda: step(engine, arguments))
        seconds.setdefault("beside, written", []).append(written)
    hashing = hashing_share(folder)
    engine.destroy()
    for _ in range(arguments.rounds):
        engine = build(arguments, config)
        timed("verify", stores[True].choose)
        timed("load", lambda engine=engine: stores[True].load(engine))
        engine.destroy()
    found = stores[True].newest()
    assert found is not None
    size = sum(path.stat().st_size for path in found.path.iterdir())
    return table({name: statistics.median(values) for name, values in seconds.items()}, parameters, size, hashing)


def build(arguments: argparse.Namespace, config: Config) -> Any:
    """Build an engine with random weights and ZeRO-3."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=int(2.75 * arguments.hidden),
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 128,
        max_position_embeddings=4096,
    )
    return engines.build(LlamaForCausalLM(settings), config)


def step(engine: Any, arguments: argparse.Namespace) -> None:
    """Take one optimizer step on random tokens."""
    tokens = torch.randint(32000, (1, arguments.tokens))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()


def save_by_deepspeed(engine: Any, folder: Path) -> None:
    """Write files as DeepSpeed does: not hashed, but flushed to disk, so that both sides do the same work."""
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
    if distributed.is_main():
        for path in (folder / "deepspeed").iterdir():
            # Without fsync the time would be that of copying to the page cache.
            with path.open("rb") as file:
                os.fsync(file.fileno())


def hashing_share(folder: Path) -> float:
    """Measure the seconds per gigabyte that hashing adds to writing, with a file of 512 MiB."""
    # 2^27 float32 values are 512 MiB, larger than any cache of the disk.
    state, path = {"x": torch.randn(2**27)}, folder / f"hashing_{distributed.rank()}.pt"
    # Alternate, so that a busy disk affects both sides.
    plain, hashed = [], []
    for _ in range(3):
        started = time.perf_counter()
        torch.save(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        plain.append(time.perf_counter() - started)
        started = time.perf_counter()
        write(state, path)
        hashed.append(time.perf_counter() - started)
    path.unlink()
    return (statistics.median(hashed) - statistics.median(plain)) / (2**29 / 1e9)


def header(arguments: argparse.Namespace) -> list[str]:
    """Describe the measurement and the machine."""
    ranks = distributed.world_size()
    launcher = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
    return [
        "# What a checkpoint costs",
        "",
        f"- command: `{launcher} {' '.join(sys.argv)}`",
        f"- hardware: one virtual machine, {processor()}, {os.cpu_count()} cores; {ranks} rank(s) of "
        f"{arguments.threads} thread(s), load average {os.getloadavg()[0]:.1f} at the end",
        f"- software: Python {platform.python_version()}, torch {version('torch')}, deepspeed {version('deepspeed')}",
        f"- medians of {arguments.rounds} rounds, each in turn",
        "",
    ]


def table(seconds: dict[str, float], parameters: int, size: int, hashing: float) -> list[str]:
    """Format the results in Markdown."""
    # A step next to a write shares cores and memory bandwidth with it.
    slower = seconds["beside, step"] / seconds["step"]
    waiting = seconds["beside, blocked"] / seconds["at once"]
    # The rest above 1 is padding, metadata, and whatever else DeepSpeed stores.
    more = size / (LEAST * parameters)
    return [
        f"Llama of {parameters / 1e6:.0f}M parameters, ZeRO-3, float32, AdamW; a step takes {seconds['step']:.2f} s.",
        "",
        "| | seconds |",
        "| --- | --- |",
        f"| DeepSpeed's save, not hashed: training waits | {seconds['deepspeed']:.2f} |",
        f"| `overlap=false`, hashed: training waits | {seconds['at once']:.2f} |",
        f"| `overlap=true`: training waits | {seconds['beside, blocked']:.2f} |",
        f"| `overlap=true`: until it is on disk | {seconds['beside, written']:.2f} |",
        f"| load: SHA-256 of all files and a look through their records | {seconds['verify']:.2f} |",
        f"| load: DeepSpeed reads it | {seconds['load']:.2f} |",
        "",
        f"Waiting with overlap is {waiting:.2f} of waiting without; a step beside a write takes {slower:.2f} of a step "
        f"alone. Hashing adds {hashing:.2f} s per GB to one rank's writing.",
        "",
        f"On disk {size / 1e9:.3f} GB, {size / parameters:.3f} bytes a parameter: {more:.4f} of the {LEAST} bytes that "
        "AdamW needs.",
    ]


if __name__ == "__main__":
    main()
