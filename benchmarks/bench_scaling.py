"""Benchmark cost and accuracy of the CLEX mathematics on one CPU thread. For a whole training step: bench_step.py.

    python benchmarks/bench_scaling.py [--goldens DIR] [--output benchmarks/results/NAME.md]

1. One solve for theta(t), forward and backward, against the original scheme: RK4 with dt = 0.01 in t, float32.
2. The first and later evaluation tables.
3. cos and sin against extended precision, and their time against Hugging Face's.
4. The ODE of a training step over a computed step at 7B shapes.

Errors are max |d log theta| against dopri8 in float64 at tolerance 1e-12. Compared sides take turns in one run.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench_page import processor, publish
from safetensors.torch import load_file
from torchdiffeq import odeint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from clex_train.config.scaling import ScalingConfig
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.spectrum import cos_sin
from clex_train.scaling.vector_field import VectorField
from clex_train.tracking.metrics import PEAK_BF16_FLOPS, flops_per_token
from clex_train.training.ode_optimizer import OdeOptimizer

HEAD_DIM = 128
SHARE_OF_PEAK = 0.4
SCALES = (2.0, 4.0, 8.0, 16.0)
Timed = tuple[float, torch.Tensor]


def main() -> None:
    """Run every section, print one Markdown page, and write it to `--output`."""
    arguments = parse()
    torch.set_num_threads(1)
    lines = [*header(), *section_solve(arguments), *section_tables(arguments), *section_cos_sin(), *section_7b()]
    publish(lines, arguments.output)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    goldens = Path(__file__).resolve().parents[1] / "tests" / "goldens"
    parser.add_argument("--goldens", type=Path, default=goldens, help="folder of clex_ode.safetensors")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each solve; the median is shown")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="of our solver, in log theta")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    return parser.parse_args()


def header() -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return [
        "# CLEX mathematics: cost and accuracy",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- commit: {commit.stdout.strip() or 'unknown'}",
        f"- hardware: {processor()}, {os.cpu_count()} logical cores, 1 thread used",
        f"- software: Python {platform.python_version()}, torch {torch.__version__}",
        "",
    ]


# 1. The solve


def section_solve(arguments: argparse.Namespace) -> list[str]:
    """Compare the solve in u with RK4 at dt = 0.01 in t, on the goldens' weights and on seeded ones."""
    rows = []
    for name, clex in fields(arguments):
        label = f"{name} ({clex.refine().num_steps} steps to t=16)"
        rows += [compare(label, clex, t, arguments.repeats) for t in SCALES]
    columns = ["weights", "t", "dt = 0.01: evaluations", "s", "error", "ours: evaluations", "s", "error", "speed-up"]
    return ["## One solve, forward and backward", "", *markdown(columns, rows), ""]


def fields(arguments: argparse.Namespace) -> Iterable[tuple[str, Clex]]:
    """Yield (name, field) of each weight set: the goldens' head of 128 at two bases, and seeded weights of std 0.02."""
    path = arguments.goldens / "clex_ode.safetensors"
    if path.exists():
        tensors = load_file(path)
        for base in (1e4, 1e6):
            clex = Clex(rope(base), 16.0, act="tanh", official_ntk_base=True, tolerance=arguments.tolerance)
            weights = {"up": tensors["hd128.tanh.pf1.ode_up_proj"], "down": tensors["hd128.tanh.pf1.ode_down_proj"]}
            clex.load_state_dict(weights, strict=False)
            yield f"hd128.tanh, base {base:.0e}", clex
    else:
        print(f"{path} is missing: the goldens' weights are left out", file=sys.stderr)
    for act in ("tanh", "silu"):
        clex = Clex(rope(1e4), 16.0, act=act, tolerance=arguments.tolerance)
        with torch.no_grad():
            clex.down.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        yield f"seeded, std 0.02, {act}", clex


def compare(name: str, clex: Clex, t: float, repeats: int) -> list[str]:
    """Format one row: both schemes in turn, medians, errors against float64."""
    truth, official = reference_log_theta(clex, t), OfficialScheme(clex)
    runs = [
        (timed_gradient(lambda: official.log_theta(t), clex), timed_gradient(lambda: our_log_theta(clex, t), clex))
        for _ in range(repeats)
    ]
    theirs, ours = (statistics.median(run[k][0] for run in runs) for k in (0, 1))
    # Only the first run: errors are deterministic.
    errors = [f"{float((runs[0][k][1].double() - truth).abs().max()):.1e}" for k in (0, 1)]
    before = [name, f"{t:g}", f"{official.evaluations // repeats:,}", f"{theirs:.3f}", errors[0]]
    return [*before, f"{count_our_evaluations(clex, t):,}", f"{ours:.4f}", errors[1], f"{theirs / ours:.0f}x"]


class OfficialScheme:
    """Solver of the original code: float32, integrating z itself in t with RK4 at dt = 0.01."""

    def __init__(self, clex: Clex) -> None:
        self.clex, self.evaluations = clex, 0
        self.num_pairs = len(clex.base_inv_freq)
        self.exponent = 2 * torch.arange(self.num_pairs, dtype=torch.float32) / (2 * self.num_pairs - 2)
        self.act = torch.nn.functional.silu if clex.act == "silu" else torch.tanh
        read = rope(1e4) if clex.official_ntk_base else clex.base_inv_freq
        self.read_base = read.log().float()

    def __call__(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        # Count calls, the cost that does not depend on the machine.
        self.evaluations += 1
        read = z + self.read_base - self.exponent * torch.log(2 * t - 1)
        return self.act(read @ self.clex.up) @ self.clex.down - self.exponent * 2 / (2 * t - 1)

    def log_theta(self, t: float) -> torch.Tensor:
        """Return log theta(t), differentiable."""
        span, start = torch.tensor([1.0, t]), self.clex.base_inv_freq.float().log()
        return odeint(self, start, span, method="rk4", options={"step_size": 0.01})[-1]


def our_log_theta(clex: Clex, t: float) -> torch.Tensor:
    """Return log theta(t), differentiable."""
    return clex.inv_freq(t).log()


def timed_gradient(solve: Callable[[], torch.Tensor], clex: Clex) -> Timed:
    """Time one forward and backward pass in seconds; return it with the solution."""
    clex.zero_grad(set_to_none=True)
    start = time.perf_counter()
    log_theta = solve()
    log_theta.sum().backward()
    return time.perf_counter() - start, log_theta.detach()


def count_our_evaluations(clex: Clex, t: float) -> int:
    """Count the evaluations of the field in one of our solves."""
    with patch.object(VectorField, "__call__", autospec=True, side_effect=VectorField.__call__) as spied:
        clex.inv_freq(t)
    return spied.call_count


def reference_log_theta(clex: Clex, t: float) -> torch.Tensor:
    """Solve for log theta(t) with dopri8 in t and float64; a step ends at t, since dense output is less exact."""
    exponent = 2 * torch.arange(len(clex.base_inv_freq), dtype=torch.float64) / (2 * len(clex.base_inv_freq) - 2)
    up, down = clex.up.detach().double(), clex.down.detach().double()
    act = torch.nn.functional.silu if clex.act == "silu" else torch.tanh
    start = clex.base_inv_freq.log()
    read_base = rope(1e4).log() if clex.official_ntk_base else start

    def field(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        read = z + read_base - exponent * torch.log(2 * s - 1)
        return act(read @ up) @ down - exponent * 2 / (2 * s - 1)

    # A tolerance far below the errors to be compared.
    span = torch.tensor([1.0, t], dtype=torch.float64)
    return odeint(field, start, span, method="dopri8", rtol=1e-12, atol=1e-12, options={"step_t": span[1:]})[-1]


# 2. Tables


def section_tables(arguments: argparse.Namespace) -> list[str]:
    """Time the first table of a fresh field, which chooses its grid, and return it with the median of later ones."""
    rows = [table_row(t_max, step, arguments.tolerance) for t_max in (16.0, 64.0) for step in (1.0, 0.25)]
    columns = ["t_max", "step of t", "scale factors", "first table, ms", "later, ms"]
    return ["## Evaluation tables (seeded weights of std 0.01, tanh)", "", *markdown(columns, rows), ""]


def table_row(t_max: float, step: float, tolerance: float) -> list[str]:
    """Time the tables of a fresh field, in milliseconds."""
    grid, clex = scale_grid(t_max, step), Clex(rope(1e4), t_max, act="tanh", tolerance=tolerance)
    with torch.no_grad():
        clex.down.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
    # The first call also chooses the grid.
    first, *later = (seconds(lambda: clex.table(grid)) for _ in range(10))
    return [f"{t_max:g}", f"{step:g}", str(len(grid)), ms(first), ms(statistics.median(later))]


# 3. cos and sin


def section_cos_sin() -> list[str]:
    """Measure accuracy at long positions and the time of one call, next to Hugging Face's module."""
    inv_freq = rope(1e4)
    stock = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HEAD_DIM, num_attention_heads=1))
    accuracy = [accuracy_row(last, inv_freq, stock) for last in (2**12, 2**16, 2**20, 10**8)]
    timing = [timing_row(length, inv_freq, stock) for length in (1, 4096, 16384)]
    left = ["positions up to", "ours, max error", "Hugging Face (float32 phase)"]
    right = ["tokens", "ours, ms", "Hugging Face, ms", "rotating q and k of one layer (32 heads), ms"]
    return ["## cos and sin (base 1e4, head 128)", "", *markdown(left, accuracy), "", *markdown(right, timing), ""]


def accuracy_row(last: int, inv_freq: torch.Tensor, stock: torch.nn.Module) -> list[str]:
    """Return the largest error over the 4096 positions before `last`."""
    # Far positions: a float32 phase loses a digit for every factor of ten.
    positions = torch.arange(last - 4096, last)[None]
    phase = positions.numpy().astype(np.longdouble)[..., None] * inv_freq.numpy().astype(np.longdouble)
    exact = np.cos(phase), np.sin(phase)
    theirs = [angles[..., : HEAD_DIM // 2] for angles in stock(torch.zeros(1), positions)]
    errors = [
        max(largest(x, y) for x, y in zip(pair, exact, strict=True)) for pair in (cos_sin(positions, inv_freq), theirs)
    ]
    return [f"{last:,}", *(f"{error:.1e}" for error in errors)]


def timing_row(length: int, inv_freq: torch.Tensor, stock: torch.nn.Module) -> list[str]:
    """Time one call for `length` tokens, in milliseconds."""
    positions = torch.arange(length)[None]
    q = torch.randn(1, 32, length, HEAD_DIM)
    cos, sin = stock(q, positions)

    def ours() -> None:
        angles = cos_sin(positions, inv_freq)
        for x in angles:
            torch.cat((x, x), dim=-1)

    calls = (ours, lambda: stock(q, positions), lambda: apply_rotary_pos_emb(q, q, cos, sin))
    return [f"{length:,}", *(ms(statistics.median(seconds(call) for _ in range(9))) for call in calls)]


# 4. The ODE of a training step


def section_7b() -> list[str]:
    """Estimate the overhead of the ODE in a step of LLaMA-2 7B: measured seconds over a computed step time."""
    scaling = ScalingConfig()
    ode = OdeOptimizer(Clex(rope(1e4), scaling.t_max), scaling, seed=0)
    with torch.no_grad():
        ode.clex.down.normal_(0, 0.001, generator=torch.Generator().manual_seed(0))
    ode.check(0)
    own = statistics.median(ode_seconds(ode, step) for step in range(1, 34))
    # The computed step time is optimistic, so the overhead is an upper bound.
    per_token = flops_per_token(6.61e9, num_layers=32, num_heads=32, head_dim=HEAD_DIM, seq_len=4096)
    rows = []
    for gpus in (8, 64):
        step = 512 * 4096 * per_token / (gpus * SHARE_OF_PEAK * PEAK_BF16_FLOPS["H100"])
        rows.append([str(gpus), f"{step:.2f}", ms(own), f"{1 + own / step:.4f}"])
    columns = ["H100 GPUs", "computed step, s", "measured ODE step on one CPU thread, ms", "ratio"]
    title = (
        f"## A training step of LLaMA-2 7B, 2.1M tokens: computed at {SHARE_OF_PEAK:.0%} of the datasheet, not measured"
    )
    return [title, "", *markdown(columns, rows), ""]


def ode_seconds(ode: OdeOptimizer, step: int) -> float:
    """Run one draw of t, solve, backward pass and AdamW of the ODE, all on the critical path."""
    start = time.perf_counter()
    ode.begin(step).inv_freq.square().sum().backward()
    ode.finish(2e-5)
    return time.perf_counter() - start


# Helpers


def rope(base: float) -> torch.Tensor:
    """Return plain RoPE frequencies in float64."""
    return base ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))


def largest(ours: torch.Tensor, exact: np.ndarray) -> float:
    """Return max |ours - exact|."""
    return float(np.abs(ours.numpy().astype(np.longdouble) - exact).max())


@torch.no_grad()
def seconds(call: Callable[[], object]) -> float:
    """Time one call without gradients."""
    return seconds_of(call)


def seconds_of(call: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ms(value: float) -> str:
    """Format milliseconds with three significant figures."""
    milli = 1e3 * value
    return f"{milli:.{max(0, 2 - math.floor(math.log10(milli)))}f}"


def markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Format a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


if __name__ == "__main__":
    main()
