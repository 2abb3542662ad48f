"""Benchmark decoding with CLEX against plain RoPE: same Llama, same tokens, one run, alternating blocks.

    python benchmarks/bench_generation.py [--contexts 4096 16384] [--cache static] [--output benchmarks/results/NAME.md]

Each block starts with a full cache of n tokens, n a multiple of L, so that the first token of every CLEX block moves t
and re-rotates all cached keys: that step is the crossing, the others are between crossings. Tokens per second include
one crossing per L tokens. The cached keys are random, since no time depends on them.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_page import processor, publish
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from clex_train.attention import kv_cache
from clex_train.rope import key_rotations
from clex_train.rope.patch import install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid

T_MAX, VOCABULARY, TARGET = 16.0, 32000, 0.98


@dataclass
class Times:
    """Seconds per token of one side."""

    steps: list[float] = field(default_factory=list)
    crossings: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    """Median step of each block, without the first step."""


def main() -> None:
    """Measure every context, print one Markdown page, and write it to `--output`."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = build_model(arguments)
    rows = [measure(model, context, arguments) for context in arguments.contexts]
    publish([*header(arguments, model), *table(rows), "", *fixed_cost(arguments)], arguments.output)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384], help="tokens in the cache")
    parser.add_argument("--context-len", type=int, default=4096, help="L; the contexts are multiples of it")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a block, the first of them a crossing")
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each side")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Build a model with random weights, on the GPU if there is one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=int(2.75 * arguments.hidden),
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=arguments.context_len,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
    return model.cuda() if torch.cuda.is_available() else model


@torch.no_grad()
def measure(model: LlamaForCausalLM, context: int, arguments: argparse.Namespace) -> list[str]:
    """Measure alternating blocks of both sides at one context; return the row of the table."""
    caches = {side: filled_cache(model, context, arguments) for side in ("plain", "clex")}
    times = {side: Times() for side in caches}
    with clex(model, arguments.context_len) as frequencies:
        # The keys count as rotated at t = n / L, as if computed there.
        spectrum = frequencies.least_upper_bound(context, arguments.context_len)
        positions = torch.arange(context, device=model.device)[None]
        key_rotations.record_keys(caches["clex"], None, spectrum, positions, context)
    for turn in range(arguments.rounds + 1):
        # Who goes first alternates, so that a machine that slows down or speeds up favours neither.
        for side in ("plain", "clex") if turn % 2 else ("clex", "plain"):
            seconds = block(model, side, caches[side], context, arguments)
            # The first turn warms up.
            if turn > 0:
                times[side].crossings.append(seconds[0])
                times[side].steps += seconds[1:]
                times[side].blocks.append(statistics.median(seconds[1:]))
    return row(context, times, arguments.context_len)


def block(model: LlamaForCausalLM, side: str, cache: Cache, context: int, arguments: argparse.Namespace) -> list[float]:
    """Time each token of one block from `context` on, after resetting the cache untimed."""
    if side == "plain":
        return decode(model, cache, context, arguments.tokens)
    with clex(model, arguments.context_len):
        return decode(model, cache, context, arguments.tokens)


def decode(model: LlamaForCausalLM, cache: Cache, context: int, num_tokens: int) -> list[float]:
    """Decode greedily step by step; the last cached token is recomputed first, which restores t."""
    shorten(cache, context - 1)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model(token, **kv_cache.as_kwargs(model, cache))
    seconds = []
    for _ in range(num_tokens):
        start = time.perf_counter()
        token = model(token, **kv_cache.as_kwargs(model, cache)).logits[:, -1:].argmax(dim=-1)
        # Synchronizes: without it a GPU would only have queued the step.
        token.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def shorten(cache: Cache, num_tokens: int) -> None:
    """Drop cache entries beyond `num_tokens`."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            # StaticCache has no crop; setting its length makes it overwrite the entries behind.
            layer.cumulative_length.fill_(num_tokens)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = num_tokens
    else:
        cache.crop(num_tokens - cache.get_seq_length())


@contextmanager
def clex(model: LlamaForCausalLM, context_len: int) -> Iterator[FrequencyTable]:
    """Install the frequencies of a field with trained-like weights; restore plain RoPE afterwards."""
    handle = install_rotary(model, context_len)
    torch.manual_seed(0)
    learned = Clex(handle.base_inv_freq, T_MAX)
    # Random weights: a zero field would reduce every table to the NTK formula.
    torch.nn.init.normal_(learned.down, std=0.01)
    frequencies = learned.table(scale_grid(T_MAX))
    handle.use(frequencies)
    try:
        yield frequencies
    finally:
        handle.undo()


def filled_cache(model: LlamaForCausalLM, context: int, arguments: argparse.Namespace) -> Cache:
    """Fill a cache with random keys and values for `context` tokens."""
    config = model.config
    shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    static = arguments.cache == "static"
    # A StaticCache cannot grow.
    room = context + arguments.tokens + 1
    cache = StaticCache(config, max_cache_len=room) if static else DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, index)
    return cache


def row(context: int, times: dict[str, Times], context_len: int) -> list[str]:
    """Format one row: medians, the crossing, tokens per second with one crossing per L tokens, and the noise."""
    plain, ours = statistics.median(times["plain"].steps), statistics.median(times["clex"].steps)
    crossing = statistics.median(times["clex"].crossings)
    # A crossing happens once in L tokens, although the blocks measure it far more often.
    mean = ((context_len - 1) * ours + crossing) / context_len
    # Ratios of neighbouring blocks cancel slow drifts of the machine.
    paired = [b / a for a, b in zip(times["plain"].blocks, times["clex"].blocks, strict=True)]
    quartiles = statistics.quantiles(times["plain"].steps, n=4)
    return [
        str(context),
        f"{1e3 * plain:.2f}",
        f"{1e3 * ours:.2f}",
        f"{1e3 * crossing:.0f}",
        f"{1 / plain:.2f}",
        f"{1 / mean:.2f}",
        f"{plain / mean:.4f}",
        f"{statistics.median(paired):.4f} ({spread(paired)})",
        f"{(quartiles[2] - quartiles[0]) / plain:.1%}",
    ]


def spread(values: list[float]) -> str:
    """Return the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.3f} to {high:.3f}"


def table(rows: list[list[str]]) -> list[str]:
    """Format a Markdown table and how to read it."""
    columns = [
        "tokens in the cache",
        "plain, ms",
        "CLEX, ms",
        "CLEX at a crossing, ms",
        "plain, tokens/s",
        "CLEX, tokens/s",
        "ratio",
        "step, CLEX / plain",
        "noise",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    return [
        *lines,
        "",
        "Milliseconds are medians over the tokens of all blocks. `CLEX, tokens/s` counts one crossing in every L",
        f"tokens; `ratio` is it over plain, target at least {TARGET}. `step, CLEX / plain` is the median over pairs of",
        "blocks of the ratio of their median steps, without crossings (quartiles). `noise` is the interquartile range",
        "of plain steps over their median.",
    ]


def fixed_cost(arguments: argparse.Namespace) -> list[str]:
    """Measure the cost of hooks and phases per step, which does not depend on model size, on a near-empty model."""
    small = argparse.Namespace(**vars(arguments))
    # So small that the model itself takes next to no time.
    small.hidden, small.heads, small.kv_heads, small.context_len, small.tokens, small.rounds = 64, 4, 1, 512, 64, 20
    cells = measure(build_model(small), 512, small)
    return [
        f"On a model of {small.layers} layers of width 64 a step takes {cells[1]} ms with plain RoPE and {cells[2]} ms",
        "with CLEX: the difference does not grow with the model or the context.",
    ]


def header(arguments: argparse.Namespace, model: LlamaForCausalLM) -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return [
        "# Decoding with CLEX against plain RoPE",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- commit: {commit.stdout.strip() or 'unknown'}",
        f"- hardware: {device}, {os.cpu_count()} logical cores, {arguments.threads} thread(s) used{load}",
        f"- software: Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
        f"- model: Llama of {size:.0f}M parameters, {arguments.layers} layers of width {arguments.hidden}, "
        f"{arguments.kv_heads} key heads, {arguments.dtype}, {arguments.cache} cache, one row, "
        f"L = {arguments.context_len}",
        f"- {arguments.rounds} blocks of {arguments.tokens} tokens a side, in turn",
        "",
    ]


if __name__ == "__main__":
    main()
