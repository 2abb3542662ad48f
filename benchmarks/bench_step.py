"""Benchmark a training step of a Llama with random weights: speed, memory, time by part, and the overhead of CLEX.

    python benchmarks/bench_step.py --shape 64m --tokens 1024 --output FILE.md
    deepspeed benchmarks/bench_step.py --shape llama2_7b --tokens 4096 --accumulation 8 \
        --set engine=zero3 data.seq_len=4096 --output FILE.md

The step is `clex_train.training.loop.train_step` over rows of random tokens, under any option of the configuration
(`--set`). Steps with plain RoPE and with CLEX take turns on one model and one engine, so that a busy moment affects
both; plain RoPE is the stock rotary module of the family. On a CPU the C library keeps freed memory, since otherwise
half of a step would be the clearing of pages. MFU counts 6 N + attention per token without recomputation, and divides
by the rate of a matrix product measured in the same run.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench_page import keep_freed_memory, processor, publish
from hydra import compose, initialize_config_dir
from step_profile import profiled
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from clex_train.config import root as configuration
from clex_train.config.root import Config
from clex_train.data.loader import batches
from clex_train.data.rows import Row
from clex_train.engine import deepspeed as engines
from clex_train.model_config import size
from clex_train.models import architecture, load, memory_options
from clex_train.preflight import kernels
from clex_train.tracking import metrics
from clex_train.training import loop
from clex_train.training.ode_optimizer import FixedFrequencies, OdeOptimizer
from clex_train.training.state import Parts
from clex_train.utils import distributed, log

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "smoke": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2},
    "21m": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4},
    "64m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 6},
    "134m": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 10, "num_attention_heads": 8},
    "llama2_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama3_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARIES = {"llama2_7b": 32000, "llama3_8b": 128256}
SMALL_VOCABULARY = 4096
WARM_UP = 2


@dataclass(frozen=True)
class RandomRows:
    """Rows of random tokens, one document each; row i is the same in every run."""

    seq_len: int
    vocabulary: int

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> Row:
        tokens = np.random.default_rng(index).integers(0, self.vocabulary, self.seq_len)
        return Row(tokens, np.zeros(self.seq_len, dtype=np.int32), index)


def main() -> None:
    """Measure, print one Markdown page on rank 0, and write it to `--output`."""
    arguments = parse()
    log.setup()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, keep_freed_memory():
        bench = StepBench(arguments, configured(arguments, Path(folder)))
        lines = measure(bench, arguments)
    if distributed.is_main():
        publish(lines, arguments.output)
    bench.engine.destroy()


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="64m")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--pairs", type=int, default=9, help="pairs of steps that are timed")
    parser.add_argument("--product", type=int, help="order of the matrix product; by default 8192, on a CPU 2048")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; by default its own choice")
    parser.add_argument("--set", nargs="*", default=[], help="keys of the configuration, such as engine=zero3_offload")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def configured(arguments: argparse.Namespace, folder: Path) -> Config:
    """Return the config of a CLEX run for this shape; the architecture is written to `folder`."""
    # Real vocabularies matter: logits and loss are a visible part of a step.
    vocabulary = VOCABULARIES.get(arguments.shape, SMALL_VOCABULARY)
    shape: dict[str, Any] = {**SHAPES[arguments.shape], "vocab_size": vocabulary}
    LlamaConfig(**shape, max_position_embeddings=arguments.tokens).save_pretrained(folder)
    rows = arguments.rows * arguments.accumulation * distributed.world_size()
    # Sequences would be sharded, and tokens per second counted several times.
    if any(key.startswith("engine.sequence_parallel=") for key in arguments.set):
        raise SystemExit("engine.sequence_parallel: this benchmark gives every rank rows of its own; leave it out")
    chosen = any(key.startswith(("engine=", "engine.activation_checkpointing=")) for key in arguments.set)
    overrides = [
        *([] if chosen else ["engine.activation_checkpointing=false"]),
        "scaling=clex",
        *arguments.set,
        "model.init=random",
        f"model.config={folder}",
        f"model.context_len={arguments.tokens}",
        "data.path=random_tokens",
        f"data.seq_len={arguments.tokens}",
        f"engine.micro_batch={arguments.rows}",
        f"optim.batch_rows={rows}",
        "evaluation=never",
    ]
    configuration.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return configuration.to_config(compose("config", overrides=overrides))


class StepBench:
    """A model, its engine, and two ways to take a step with them."""

    def __init__(self, arguments: argparse.Namespace, config: Config) -> None:
        engines.open_process_group(config.engine)
        arch = architecture.to_train(config.model)
        config = kernels.resolve_attention(config, arch)
        settings = engines.deepspeed_dict(config, distributed.world_size())
        loaded = load.load_for_training(config, arch, engines.precision(config.engine), settings)
        kernels.announce(config, arch, kernels.install(loaded.model, config))
        memory_options.install(loaded.model, config.engine)
        assert loaded.clex is not None
        ode = OdeOptimizer(loaded.clex, config.scaling, config.seed)
        # A non-zero field, since the solver would have less to do at zero.
        with torch.no_grad():
            loaded.clex.down.normal_(0, 0.001, generator=torch.Generator().manual_seed(0))
        # Choose the grid now: the check is due every 100 steps and would be timed.
        ode.check(0)
        self.engine, self.config = engines.build(loaded.model, config), config
        flops = metrics.flops_per_token(*size.matmul_shape(loaded.model), config.data.seq_len)
        rows = RandomRows(config.data.seq_len, arch.vocab_size)
        nothing: Any = None
        self.parts = Parts(config, self.engine, loaded, rows, ode, nothing, None, flops_per_token=flops)
        self.tokens = config.data.seq_len * config.optim.batch_rows
        self.stock = LlamaRotaryEmbedding(arch).to(distributed.device())
        self._stream = self._batches()
        # The step before the first check of the grid is due again.
        self._steps = {"plain RoPE": 1, "CLEX": 1}

    def clex(self) -> float:
        """Time a step with CLEX in seconds, synchronizing the device before and after."""
        return self._timed("CLEX", self.parts)

    def plain(self) -> float:
        """Time a step with the family's own rotary module and without an ODE, in seconds."""
        unscaled = replace(self.parts.loaded, clex=None)
        with self._stock_rotary():
            return self._timed("plain RoPE", replace(self.parts, ode=FixedFrequencies(), loaded=unscaled))

    def _timed(self, name: str, parts: Parts) -> float:
        step = self._steps[name]
        self._steps[name] += 1
        wait()
        start = time.perf_counter()
        loop.train_step(parts, step, next(self._stream))
        wait()
        return time.perf_counter() - start

    @contextmanager
    def _stock_rotary(self) -> Iterator[None]:
        """Compute what the stock module does without replacing the module: ZeRO-3 has recorded the order of modules."""
        rotary = self.parts.loaded.handle.rotary
        rotary.forward = self.stock.forward  # type: ignore[method-assign]
        yield
        del rotary.forward

    def _batches(self) -> Iterator[Any]:
        return batches(
            self.parts.rows,
            first_row=0,
            batch_rows=self.config.optim.batch_rows,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            micro_batch=self.config.engine.micro_batch or 1,
        )


def measure(bench: StepBench, arguments: argparse.Namespace) -> list[str]:
    """Measure and return the lines of the page."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        bench.plain(), bench.clex()
    before, pairs = product_rate(arguments, bench), []
    for index in range(arguments.pairs):
        # The second side may find a warmer machine, so the order alternates too.
        first, second = (bench.plain, bench.clex) if index % 2 == 0 else (bench.clex, bench.plain)
        one, other = first(), second()
        pairs.append((one, other) if index % 2 == 0 else (other, one))
    # Measured before and after: a device that throttles in between shows in the median.
    rate = statistics.median([before, product_rate(arguments, bench)])
    lines = [*header(bench, arguments), *speeds(bench, pairs, rate), *ode_seconds(bench)]
    lines += [*waits(bench), *profiled(bench.parts, bench.clex)]
    return [*lines, "", f"{time.perf_counter() - began:.0f} s in all; load at the end {os.getloadavg()[0]:.1f}."]


def header(bench: StepBench, arguments: argparse.Namespace) -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    config, on_gpu = bench.config, torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {os.cpu_count()} logical cores"
    threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    millions = size.num_parameters(bench.parts.loaded.model) / 1e6
    return [
        f"# A training step of a Llama of {millions:,.1f}M parameters",
        "",
        f"- command: `python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`",
        f"- commit: {commit.stdout.strip() or 'unknown'}",
        f"- hardware: {distributed.world_size()} x {device} ({platform.machine()}){threads}, "
        f"load at the beginning {os.getloadavg()[0]:.1f}",
        f"- software: Python {platform.python_version()}, torch {torch.__version__}",
        f"- model: {SHAPES[arguments.shape]}, random weights, {engines.precision(config.engine)}",
        f"- step: {config.optim.batch_rows} rows of {config.data.seq_len:,} random tokens, accumulation "
        f"{arguments.accumulation}, ZeRO-{config.engine.zero_stage}, offload {config.engine.offload.name}, "
        f"attention {config.attention.implementation.name}, activation checkpointing "
        f"{'on' if config.engine.activation_checkpointing else 'off'}",
        "",
    ]


def speeds(bench: StepBench, pairs: list[tuple[float, float]], rate: float) -> list[str]:
    """Format both step times and their ratio pair by pair."""
    rows = []
    for column, name in enumerate(("plain RoPE", "CLEX")):
        seconds = statistics.median(pair[column] for pair in pairs)
        speed = bench.tokens / seconds
        # Relative to the measured rate of this machine, since no product reaches that of the data sheet.
        share = speed * bench.parts.flops_per_token / (rate * distributed.world_size())
        rows.append(f"| {name} | {1e3 * seconds:,.1f} | {speed:,.0f} | {100 * share:.1f} % |")
    # Pairs are neighbours in time, so their ratio does not see the machine change.
    ratios = sorted(pair[1] / pair[0] for pair in pairs)
    quarter, least = len(ratios) // 4, [min(seconds) for seconds in zip(*pairs, strict=True)]
    return [
        "| | ms a step, median | tokens/s | MFU |",
        "|---|--:|--:|--:|",
        *rows,
        "",
        f"CLEX over plain RoPE, median of {len(pairs)} pairs in turns: **{statistics.median(ratios):.4f}** "
        f"(middle half {ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f}); the least of each: "
        f"{1e3 * least[1]:,.1f} over {1e3 * least[0]:,.1f} ms, {least[1] / least[0]:.4f}.",
        "",
        f"MFU: {bench.parts.flops_per_token / 1e6:,.1f} MFLOP a token (6 N + attention, nothing for recomputation) "
        f"over {rate / 1e9:,.1f} GFLOP/s of a matrix product in the same run. Peak memory "
        f"{metrics.peak_memory_gib():.2f} GiB ({'allocated' if torch.cuda.is_available() else 'resident'}).",
    ]


def ode_seconds(bench: StepBench) -> list[str]:
    """Measure the time of the ODE on the host in a step, as medians over a few steps."""
    ode, spent = bench.parts.ode, {"begin": [], "finish": [], "prefetch": []}  # type: dict[str, list[float]]
    # Wrap the methods on the instance; deleting the attribute restores the class's method.
    for name, times in spent.items():
        setattr(ode, name, clocked(getattr(ode, name), times))
    for _ in range(5):
        bench.clex()
    for name in spent:
        delattr(ode, name)
    parts = ", ".join(f"{name} {1e3 * statistics.median(times):.2f}" for name, times in spent.items())
    return ["", f"The ODE on the host, ms: {parts}. `finish` and `prefetch` run beside the update of the weights."]


def waits(bench: StepBench) -> list[str]:
    """List the places where the host waited for the GPU in a step, from torch's warnings; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    with warnings.catch_warnings(record=True) as caught:
        # By default Python shows a warning once per line.
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        bench.clex()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)
    )
    found = ", ".join(f"{place} {count}" for place, count in places.most_common()) or "none"
    return ["", f"Waits of the host for the GPU in a step, by the line that waited: {found}."]


def clocked(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """Wrap `call` to append its seconds to `times`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        times.append(time.perf_counter() - start)
        return result

    return run


def product_rate(arguments: argparse.Namespace, bench: StepBench) -> float:
    """Measure the FLOP/s of a square matrix product in the step's dtype, median of several runs."""
    on_gpu, device = torch.cuda.is_available(), distributed.device()
    # Large enough to saturate the device, small enough for seconds.
    order, repeats = arguments.product or (8192 if on_gpu else 2048), 20 if on_gpu else 3
    left, right = (torch.randn(order, order, device=device).to(engines.precision(bench.config.engine)) for _ in "ab")
    seconds = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        left @ right
        wait()
        seconds.append(time.perf_counter() - start)
    # A multiply and an add for each of order^3 products; the first run warms up.
    return 2 * order**3 / statistics.median(seconds[1:])


def wait() -> None:
    """Wait until the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
