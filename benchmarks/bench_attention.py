"""Benchmark one attention layer in training: full attention with each back end against LM-Infinite, at growing lengths.

    python benchmarks/bench_attention.py --lengths 4096 16384 --output FILE.md

One decoder layer of a Llama with a small MLP and vocabulary, so that projections and attention dominate: forward alone,
and forward with backward. Back ends that this machine lacks are named and skipped. At every length all take turns; a
back end that runs out of memory, or would exceed `--limit` seconds judging by the previous length, is skipped from
there on. Decoding and prefill: bench_lm_infinite.py.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_page import processor, publish
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from clex_train.attention.select import sdpa_kernel
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.utils.errors import is_out_of_memory

VOCABULARY, INTERMEDIATE = 64, 64
LM_INFINITE = "LM-Infinite"


class Layer:
    """Model of one layer with one kind of attention."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        # Equal weights in every layer, so that all do the same work.
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=arguments.heads * arguments.head_dim,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=1,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.key_heads or arguments.heads,
            max_position_embeddings=max(arguments.lengths),
            attn_implementation="sdpa" if name == LM_INFINITE else name,
            # Training has no cache; building one would be timed as well.
            use_cache=False,
        )
        self.name, self.config, self.is_out = name, config, False
        self.model = LlamaForCausalLM(config).to(arguments.device, arguments.dtype).train()
        if name == LM_INFINITE:
            apply_lm_infinite(self.model, arguments.n_local, arguments.n_global)

    def forward(self, ids: torch.Tensor) -> float:
        """Time a forward pass without a graph, in seconds."""
        with torch.no_grad():
            # One row of logits: the head over the whole vocabulary would hide the attention.
            return timed(lambda: self.model(ids, logits_to_keep=1))

    def forward_backward(self, ids: torch.Tensor) -> float:
        """Time a forward pass and the backward pass of a scalar loss, in seconds."""
        seconds = timed(lambda: self.model.model(ids).last_hidden_state.float().square().mean().backward())
        # Freed outside the timing, and so that the next pass does not accumulate.
        self.model.zero_grad(set_to_none=True)
        return seconds


def main() -> None:
    """Measure, print one Markdown page, and write it to `--output`."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    began, refusals = time.perf_counter(), refused()
    layers = [Layer(name, arguments) for name in arguments.back_ends if name not in refusals]
    lines = header(arguments, layers)
    lines += [f"- {name}: left out, {reason}" for name, reason in refusals.items() if name in arguments.back_ends]
    lines += table("Forward, ms", layers, arguments, Layer.forward)
    # The backward pass has other memory needs than the forward pass, so every back end is tried again.
    for layer in layers:
        layer.is_out = False
    lines += table("Forward and backward, ms", layers, arguments, Layer.forward_backward)
    lines += ["", f"{time.perf_counter() - began:.0f} s in all; load at the end {os.getloadavg()[0]:.1f}."]
    publish(lines, arguments.output)


def parse() -> argparse.Namespace:
    """Parse the sizes; the defaults suit a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["sdpa", "flash_attention_2", "flex_attention", LM_INFINITE]
    parser.add_argument("--back-ends", nargs="+", choices=names, default=names)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, help="by default as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--n-local", type=int, default=2048)
    parser.add_argument("--n-global", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one call may take")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    arguments.device = torch.device("cuda" if on_gpu else "cpu")
    arguments.dtype = torch.bfloat16 if on_gpu else torch.float32
    # Ascending: a back end is skipped by its time at the previous length.
    arguments.lengths.sort()
    return arguments


def refused() -> dict[str, str]:
    """List the back ends that this machine lacks, with the reason."""
    reasons = {}
    if not is_flash_attn_2_available():
        reasons["flash_attention_2"] = "flash-attn is not installed, or there is no GPU"
    if not torch.cuda.is_available():
        reasons["flex_attention"] = "its kernels are compiled for a GPU"
    elif find_spec("triton") is None:
        reasons["flex_attention"] = "triton is not installed"
    return reasons


def header(arguments: argparse.Namespace, layers: list[Layer]) -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {arguments.threads} threads"
    kernel = sdpa_kernel(layers[0].config, max(arguments.lengths), arguments.dtype, arguments.device)
    return [
        "# Attention of one layer in training",
        "",
        f"- command: `python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`",
        f"- commit: {commit.stdout.strip() or 'unknown'}",
        f"- hardware: {device} ({platform.machine()}), load at the beginning {os.getloadavg()[0]:.1f}",
        f"- software: torch {torch.__version__}, {arguments.dtype}; SDPA takes its {kernel} kernel",
        f"- layer: {arguments.heads} heads of {arguments.head_dim}, {arguments.key_heads or arguments.heads} of keys; "
        f"LM-Infinite with L = {arguments.n_local:,}, G = {arguments.n_global}",
    ]


def table(
    title: str, layers: list[Layer], arguments: argparse.Namespace, run: Callable[[Layer, torch.Tensor], float]
) -> list[str]:
    """Format the medians at each length, and the ratio of the first back end to LM-Infinite, paired by round."""
    lines = ["", f"## {title}", "", f"| tokens | {' | '.join(each.name for each in layers)} | {ratio_name(layers)} |"]
    lines.append("|--:|" + "--:|" * (len(layers) + 1))
    taken: dict[str, float] = {}
    for index, length in enumerate(arguments.lengths):
        # Quadratic, the worst case; LM-Infinite grows linearly and is never close to the limit.
        growth = (length / arguments.lengths[index - 1]) ** 2 if index else 1.0
        for each in layers:
            each.is_out |= growth * taken.get(each.name, 0.0) > arguments.limit
        spent = rounds(layers, torch.randint(VOCABULARY, (1, length), device=arguments.device), arguments.rounds, run)
        taken |= {name: statistics.median(seconds) for name, seconds in spent.items()}
        cells = [f"{1e3 * taken[each.name]:,.1f}" if each.name in spent else "-" for each in layers]
        lines.append(f"| {length:,} | {' | '.join(cells)} | {ratio(layers, spent)} |")
    return lines


def rounds(
    layers: list[Layer], ids: torch.Tensor, count: int, run: Callable[[Layer, torch.Tensor], float]
) -> dict[str, list[float]]:
    """Time the layers in turn, in seconds, after a warm-up round; skip layers that run out of memory."""
    spent: dict[str, list[float]] = {}
    for _ in range(count + 1):
        for layer in layers:
            if layer.is_out:
                continue
            try:
                spent.setdefault(layer.name, []).append(run(layer, ids))
            except (RuntimeError, MemoryError) as error:
                # Anything else is a bug of the benchmark and must not look like a missing number.
                if not is_out_of_memory(error):
                    raise
                layer.is_out = True
                torch.cuda.empty_cache()
    # The first round compiles kernels and fills caches.
    return {layer.name: spent[layer.name][1:] for layer in layers if not layer.is_out}


def ratio_name(layers: list[Layer]) -> str:
    """Return the heading of the last column."""
    return f"{layers[0].name} over {layers[-1].name}"


def ratio(layers: list[Layer], spent: dict[str, list[float]]) -> str:
    """Return the median over the rounds."""
    first, last = (spent.get(layer.name) for layer in (layers[0], layers[-1]))
    if not first or not last:
        return "-"
    # Ratios per round, then the median: a busy moment affects both sides of a pair.
    return f"{statistics.median(a / b for a, b in zip(first, last, strict=True)):.2f}"


def timed(run: Callable[[], object]) -> float:
    """Time one call in seconds, synchronizing the device before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
