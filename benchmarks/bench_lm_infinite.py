"""Time and memory of LM-Infinite against plain attention of the same model, on one machine in one run.

    python benchmarks/bench_lm_infinite.py [--lengths 2048 8192 32768] [--decode-at 2048 32768] [--output FILE.md]

The model: 2 layers, hidden 512, 4 heads of 128, random weights; L = 2048, G = 10. Whole forwards are timed, logits of
the last token only. Plain attention is SDPA; it decodes from a DynamicCache (which copies its keys each step) and from
a StaticCache (which does not). Prefills take turns, and the median is kept; of decoding steps the mean.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_page import publish
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from clex_train.attention.hf_interface import LmInfinite, apply_lm_infinite

VOCABULARY = 512


def main() -> None:
    """Print one Markdown page, and write it where `--output` says."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    longest = max(*arguments.lengths, *arguments.decode_at) + arguments.tokens
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=longest,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        lines = [*header(arguments), *section_prefill(model, arguments), *section_decoding(model, arguments)]
        if arguments.stream:
            lines += section_stream(model, arguments)
    publish(lines, arguments.output)


def parse() -> argparse.Namespace:
    """Sizes; the defaults are those of the page of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--plain-up-to", type=int, default=32768, help="longest prefill of plain attention")
    parser.add_argument("--decode-at", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=256, help="decoding steps that are averaged")
    parser.add_argument("--stream", type=int, default=0, help="also stream this many tokens and watch the memory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--n-local", type=int, default=2048)
    parser.add_argument("--n-global", type=int, default=10)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def header(arguments: argparse.Namespace) -> list[str]:
    """What was run, on what."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return [
        "# LM-Infinite against plain attention",
        "",
        f"`python benchmarks/bench_lm_infinite.py {' '.join(sys.argv[1:])}` at {commit.stdout.strip()}, "
        f"torch {torch.__version__}, {platform.machine()} with {os.cpu_count()} processors, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}",
    ]


def section_prefill(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Seconds of one forward, and per 1,000 tokens."""
    lines = [
        "",
        "## Prefill",
        "",
        "| tokens | LM-Infinite s | per 1k | plain s | per 1k | faster |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for length in arguments.lengths:
        ids = torch.randint(VOCABULARY, (1, length))
        rivals = {"ours": lambda ids=ids: ours(model, arguments, ids)}
        if length <= arguments.plain_up_to:
            rivals["plain"] = lambda ids=ids: forward(model, ids, None)
        seconds = in_turns(rivals, arguments.repeats)
        cells = [f"{length:,}", f"{seconds['ours']:.3f}", f"{seconds['ours'] / length * 1000:.4f}"]
        if "plain" in seconds:
            plain = seconds["plain"]
            cells += [f"{plain:.3f}", f"{plain / length * 1000:.4f}", f"{plain / seconds['ours']:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section_decoding(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """Milliseconds of a decoding step after a context."""
    titles = "| context | LM-Infinite ms | plain, DynamicCache ms | plain, StaticCache ms | faster than the better |"
    lines = ["", "## Decoding", "", titles, "|--:|--:|--:|--:|--:|"]
    for length in arguments.decode_at:
        ids = torch.randint(VOCABULARY, (1, length))
        handle = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
        constant = handle.new_cache()
        forward(model, ids, constant)
        step = [steps(model, constant, arguments.tokens)]
        handle.undo()
        plain: list[Cache] = [
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=length + arguments.tokens + 1),
        ]
        for cache in plain:
            forward(model, ids, cache)
            step.append(steps(model, cache, arguments.tokens))
        cells = [f"{length:,}", *(f"{1000 * seconds:.2f}" for seconds in step), f"{min(step[1:]) / step[0]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section_stream(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[str]:
    """The resident memory of the process as a stream of tokens goes through one cache, 4,096 at a time."""
    handle = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    cache, chunk = handle.new_cache(), 4096
    lines = ["", "## Streaming", "", "| tokens | peak memory GiB | s per 1k |", "|--:|--:|--:|"]
    marks, began = {arguments.stream * part // 8 // chunk for part in range(1, 9)}, time.perf_counter()
    for index in range(1, arguments.stream // chunk + 1):
        forward(model, torch.randint(VOCABULARY, (1, chunk)), cache)
        if index in marks:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            seconds = (time.perf_counter() - began) / (index * chunk) * 1000
            lines.append(f"| {index * chunk:,} | {memory:.3f} | {seconds:.4f} |")
    handle.undo()
    return lines


def ours(model: LlamaForCausalLM, arguments: argparse.Namespace, ids: torch.Tensor) -> None:
    """One forward of LM-Infinite, without a cache."""
    handle: LmInfinite = apply_lm_infinite(model, arguments.n_local, arguments.n_global)
    forward(model, ids, None)
    handle.undo()


def forward(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache | None) -> None:
    """One call of the model, which takes in `ids`."""
    model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)


def steps(model: LlamaForCausalLM, cache: Cache, num_tokens: int) -> float:
    """Mean seconds of a call with one more token (not the median: now and then a cache moves its buffer)."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    return statistics.fmean(timed(lambda: forward(model, token, cache)) for _ in range(num_tokens))


def in_turns(rivals: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run: Callable[[], None]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
