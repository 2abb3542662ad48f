"""Benchmark time and memory of LM-Infinite against plain attention of the same model, on one machine in one run.

    python benchmarks/bench_lm_infinite.py --output FILE.md                        # times, and memory of a prefill
    python benchmarks/bench_lm_infinite.py --only stream --stream 1048576          # memory over a long stream
    python benchmarks/bench_lm_infinite.py --smoke                                 # small sizes, as a smoke test

The model: 2 layers, hidden 512, 4 heads of 128, random weights; L = 2048, G = 10. Whole calls of the model are timed,
with the logits of the last token only. Both sides take turns, so that a busy moment affects both.
"""

import argparse
import copy
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_page import keep_freed_memory, processor, publish
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from clex_train.attention import kv_cache
from clex_train.lm_infinite.install import apply_lm_infinite

VOCABULARY, CHUNK = 512, 4096
LAYERS, HEADS, HEAD_DIM, MLP_PER_HEAD = 2, 4, 128, 344
SMOKE = {
    "prefill": [512, 1024, 2048],
    "plain_at": 1024,
    "decode_at": [512, 1024, 2048],
    "memory": [1024, 4096],
    "rounds": 2,
    "plain_rounds": 1,
    "steps": 4,
    "decode_rounds": 2,
    "n_local": 256,
}


def main() -> None:
    """Print one Markdown page, and write it to `--output`."""
    arguments = parse()
    # All cores shared with other processes give noisier times than a fixed number.
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    longest = max(*arguments.prefill, *arguments.decode_at, *arguments.memory)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEAD_DIM * arguments.heads, intermediate_size=MLP_PER_HEAD * arguments.heads,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, max_position_embeddings=2 * longest,
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    model, began = LlamaForCausalLM(config).eval(), time.perf_counter()
    lines = header(arguments)
    with torch.inference_mode():
        for name in arguments.only:
            lines += SECTIONS[name](model, arguments)
    lines += ["", f"{time.perf_counter() - began:.0f} s in all; load at the end {os.getloadavg()[0]:.1f}."]
    publish(lines, arguments.output)


def parse() -> argparse.Namespace:
    """Parse the sizes; the defaults are those of the results page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=["prefill", "decoding", "memory"])
    parser.add_argument("--prefill", type=int, nargs="+", default=[8192, 32768, 65536], help="lengths of one call")
    parser.add_argument("--plain-at", type=int, default=32768, help="context at which plain attention stands beside")
    parser.add_argument("--decode-at", type=int, nargs="+", default=[4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--memory", type=int, nargs="+", default=[16384, 65536, 131072], help="lengths of one call")
    parser.add_argument("--stream", type=int, default=1 << 20, help="tokens of the section `stream`")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each length of prefill")
    parser.add_argument("--plain-rounds", type=int, default=3, help="in how many of them plain attention takes part")
    parser.add_argument("--steps", type=int, default=16, help="decoding steps of one turn")
    parser.add_argument("--decode-rounds", type=int, default=16)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--heads", type=int, default=HEADS, help="of 128 components each")
    parser.add_argument("--batch", type=int, default=1, help="rows that decode together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-local", type=int, default=2048)
    parser.add_argument("--n-global", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="small sizes in place of these")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    if arguments.plain_at not in arguments.prefill or arguments.plain_at not in arguments.decode_at:
        parser.error(f"--plain-at {arguments.plain_at}: one of the lengths of --prefill and of --decode-at")
    return arguments


def header(arguments: argparse.Namespace) -> list[str]:
    """Describe the measurement and the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return [
        "# LM-Infinite against plain attention",
        "",
        f"`python benchmarks/bench_lm_infinite.py {' '.join(sys.argv[1:])}` at {commit.stdout.strip()}, "
        f"torch {torch.__version__}, {device} ({platform.machine()}, {os.cpu_count()} processors), "
        f"{arguments.threads} threads, {torch.get_default_dtype()}, load at the beginning {os.getloadavg()[0]:.1f}.",
        "",
        f"{arguments.layers} layers, {arguments.heads} heads of {HEAD_DIM}, {arguments.batch} rows in decoding, "
        f"L = {arguments.n_local:,}, G = {arguments.n_global}; whole model, plain attention is SDPA.",
    ]


def section_prefill(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Measure seconds per 1,000 tokens of a call without a cache; every turn reads the same number of tokens."""
    longest, plain_at = max(arguments.prefill), arguments.plain_at
    texts = {length: torch.randint(VOCABULARY, (1, length)) for length in arguments.prefill}
    ours: dict[int, list[float]] = {length: [] for length in texts}
    plain: list[float] = []
    # A copy with the same weights, so that LM-Infinite can stay installed on the other model between turns.
    rival = copy.deepcopy(model)
    handle = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    with keep_freed_memory():
        forward(model, texts[longest], None)
        # One call each before the timing, which allocates the buffers.
        forward(rival, texts[min(texts)], None)
        for index in range(arguments.rounds):
            for length, ids in texts.items():
                # Short texts are repeated, or the resolution of the clock and of the scheduler would dominate.
                calls = max(1, longest // length)
                seconds = sum(timed(lambda ids=ids: forward(model, ids, None)) for _ in range(calls))
                ours[length].append(1000 * seconds / (calls * length))
            # Plain attention takes minutes at this length.
            if index < arguments.plain_rounds:
                plain.append(1000 * timed(lambda: forward(rival, texts[plain_at], None)) / plain_at)
    handle.undo()
    lines = [
        "",
        "## Prefill",
        "",
        "Seconds per 1,000 tokens of one call. The C library keeps what is freed (`MALLOC_MMAP_MAX_=0 "
        "MALLOC_TRIM_THRESHOLD_=2147483647`), for all alike: by default it returns tensors above 32 MiB to the "
        "system, which clears the pages of the next ones anew, and a longer call has more such tensors.",
        "",
    ]
    lines += [
        "| tokens | LM-Infinite, median | least - most | against the shortest, in one round |",
        "|--:|--:|--:|--:|",
    ]
    shortest = ours[min(texts)]
    for length, seconds in ours.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, shortest, strict=True))
        spread = f"{min(seconds):.4f} - {max(seconds):.4f}"
        lines.append(f"| {length:,} | {statistics.median(seconds):.4f} | {spread} | {ratio:.3f} |")
    faster = statistics.median(a / b for a, b in zip(plain, ours[plain_at][: len(plain)], strict=True))
    return [
        *lines,
        "",
        f"Plain attention at {plain_at:,}: {statistics.median(plain):.4f} ({min(plain):.4f} - {max(plain):.4f}); "
        f"LM-Infinite is **{faster:.2f} times faster** (median of the ratios of {len(plain)} rounds).",
    ]


def section_decoding(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Measure milliseconds per decoding step, as means: LM-Infinite moves its buffer every L / 8 steps."""
    rival, handle = copy.deepcopy(model), apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    ours = {
        f"LM-Infinite at {length:,}": read(model, handle.new_cache(), length, arguments.batch)
        for length in arguments.decode_at
    }
    at, room = arguments.plain_at, arguments.steps * arguments.decode_rounds
    # Both caches: DynamicCache copies all keys in each step, which would flatter LM-Infinite.
    plain: dict[str, Cache] = {
        f"plain at {at:,}, DynamicCache": filled(DynamicCache(config=model.config), at, arguments),
        f"plain at {at:,}, StaticCache": filled(
            StaticCache(config=model.config, max_cache_len=at + room), at, arguments
        ),
    }
    rounds: dict[str, list[float]] = {name: [] for name in (*ours, *plain)}
    for _ in range(arguments.decode_rounds):
        for name, cache in ours.items():
            rounds[name].append(steps(model, cache, arguments.steps, arguments.batch))
        for name, cache in plain.items():
            rounds[name].append(steps(rival, cache, arguments.steps, arguments.batch))
    handle.undo()
    mean = {name: statistics.fmean(seconds) for name, seconds in rounds.items()}
    lines = ["", "## Decoding", "", f"Milliseconds of a step, {room} steps each in turns of {arguments.steps}.", ""]
    lines += ["| | mean | median turn | least - most |", "|:--|--:|--:|--:|"]
    for name, seconds in rounds.items():
        cells = (1000 * number for number in (mean[name], statistics.median(seconds), min(seconds), max(seconds)))
        lines.append("| {} | {:.2f} | {:.2f} | {:.2f} - {:.2f} |".format(name, *cells))
    here, best = mean[f"LM-Infinite at {at:,}"], min(plain, key=lambda name: mean[name])
    ratios = ", ".join(f"{mean[name] / here:.2f} ({name.split(', ')[1]})" for name in plain)
    constant = [mean[name] for name in ours]
    return [
        *lines,
        "",
        f"At {at:,} LM-Infinite is faster by {ratios}. The fair figure is the smaller, **{mean[best] / here:.2f}**: a "
        "DynamicCache copies all keys in every step, a StaticCache none. The caches of plain attention are filled with "
        "random keys, on which the time of a step does not depend.",
        f"The slowest of the contexts of LM-Infinite takes {max(constant) / min(constant):.3f} times the fastest.",
    ]


def section_memory(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Measure the peak of the resident set in one call without a cache, above weights and Python."""
    handle = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    forward(model, torch.randint(VOCABULARY, (1, 2 * arguments.n_local)), None)
    lines = ["", "## Memory of a prefill", "", "| tokens | MiB above the weights | KiB a token |", "|--:|--:|--:|"]
    for length in arguments.memory:
        ids = torch.randint(VOCABULARY, (1, length))
        # Default arguments bind the loop's value; a closure would see the last one.
        peak = peak_above(lambda ids=ids: forward(model, ids, None))
        lines.append(f"| {length:,} | {peak:,.0f} | {1024 * peak / length:.1f} |")
    handle.undo()
    # Subtract what any attention would need, to judge the rest.
    mlp = 4 * arguments.heads * (4 * MLP_PER_HEAD + 2 * HEAD_DIM) / 1024
    return [*lines, "", f"The MLP of the model holds {mlp:.1f} KiB a token of these at its peak, whatever attends."]


def section_stream(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Measure the resident set while a stream passes through one constant cache, 4,096 tokens a call, and in decoding.

    Each line gives the peak of all calls since the last line, above the resident set before the stream.
    """
    handle = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    cache, before = handle.new_cache(), trimmed()
    # Geometric marks: growth with the length would show as growth from line to line.
    marks = [mark for mark in (arguments.stream >> shift for shift in (8, 6, 4, 2, 1, 0)) if mark >= CHUNK]
    lines = ["", "## A stream", "", "| tokens | MiB, reading | MiB, decoding | s per 1k | ms a step |"]
    lines.append("|--:|--:|--:|--:|--:|")
    done = 0
    for mark in marks:
        began, count, reading = time.perf_counter(), 0, 0.0
        while done + CHUNK <= mark:
            ids = torch.randint(VOCABULARY, (1, CHUNK))
            reading = max(reading, peak_above(lambda ids=ids: forward(model, ids, cache), before))
            done, count = done + CHUNK, count + CHUNK
        per_1k = 1000 * (time.perf_counter() - began) / max(count, 1)
        spent: list[float] = []
        decoding = peak_above(
            lambda spent=spent: spent.append(steps(model, cache, arguments.steps, arguments.batch)), before
        )
        lines.append(f"| {done:,} | {reading:.1f} | {decoding:.1f} | {per_1k:.4f} | {1000 * spent[0]:.2f} |")
    handle.undo()
    return lines


def read(model: LlamaForCausalLM, cache: Cache, length: int, num_rows: int) -> Cache:
    """Feed random texts of `length` tokens to `cache` and return it."""
    for first in range(0, length, CHUNK):
        forward(model, torch.randint(VOCABULARY, (num_rows, min(CHUNK, length - first))), cache)
    return cache


def filled(cache: Cache, length: int, arguments: argparse.Namespace) -> Cache:
    """Fill a cache with random keys and values for `length` tokens."""
    shape = (arguments.batch, arguments.heads, length, HEAD_DIM)
    for layer in range(arguments.layers):
        # Values do not affect the time of a step.
        cache.update(*(torch.randn(shape) for _ in range(2)), layer)
    return cache


def forward(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache | None) -> None:
    """Call the model once on `ids`."""
    model(ids, use_cache=cache is not None, logits_to_keep=1, **kv_cache.as_kwargs(model, cache))


def steps(model: LlamaForCausalLM, cache: Cache, num_tokens: int, num_rows: int = 1) -> float:
    """Return the mean seconds of a call with one more token per row."""
    token = torch.zeros(num_rows, 1, dtype=torch.int64)
    return statistics.fmean(timed(lambda: forward(model, token, cache)) for _ in range(num_tokens))


def timed(run: Callable[[], None]) -> float:
    """Time one call in seconds, synchronizing the device before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def peak_above(run: Callable[[], None], before: float | None = None) -> float:
    """Return the MiB by which the resident set peaks during `run` above `before` (default: the current value)."""
    resident = trimmed()
    Path("/proc/self/clear_refs").write_text("5")  # Reset the peak.
    run()
    return status("VmHWM") - (resident if before is None else before)


def trimmed() -> float:
    """Return the resident MiB after freed memory has gone back to the system."""
    # glibc keeps freed memory, which would count as used.
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> float:
    """Read a memory figure of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


SECTIONS = {
    "prefill": section_prefill,
    "decoding": section_decoding,
    "memory": section_memory,
    "stream": section_stream,
}

if __name__ == "__main__":
    main()
