"""Metrics of a training step: throughput, MFU, memory, and the row indices as spans."""

import re
import resource

import torch

from clex_train.utils import distributed

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "H200 NVL": 836e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 836e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI300X": 1307e12,
}
"""Dense bf16 peak in FLOP/s by the vendor's datasheet, by words of the GPU's name; the longest that matches counts."""


def flops_per_token(num_parameters: float, num_layers: int, num_heads: int, head_dim: int, seq_len: int) -> float:
    """Estimate the FLOPs of forward and backward for one token: 6 N + 6 * layers * heads * head_dim * S.

    N counts the parameters that take part in matrix products (PaLM, arXiv 2204.02311, appendix B).
    """
    # PaLM's attention term, 12 * ..., counts the full score matrix; a causal mask needs half. Recomputed activations
    # are not counted, which makes this MFU and not HFU.
    return 6.0 * num_parameters + 6.0 * num_layers * num_heads * head_dim * seq_len


def speed(
    step: int, tokens: int, seconds: float, flops_of_a_token: float, peak_tflops: float | None = None
) -> dict[str, float]:
    """Compute the metrics of step `step` (0-based), in which all ranks together read `tokens` tokens in `seconds`.

    `mfu` is among them if the peak of the device is known or given in TFLOP/s.
    """
    figures = {
        "tokens": (step + 1) * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "memory_gib": peak_memory_gib(),
    }
    peak = peak_tflops * 1e12 if peak_tflops else device_peak()
    if peak is not None:
        # Of all devices together: the tokens are those of all ranks.
        figures["mfu"] = tokens / seconds * flops_of_a_token / (peak * distributed.world_size())
    return figures


def device_peak() -> float | None:
    """Return the dense bf16 peak of this rank's GPU in FLOP/s; None on a CPU and for an unknown GPU."""
    return named_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def named_peak(name: str) -> float | None:
    """Look up the peak by the name that CUDA gives a GPU, such as `NVIDIA H100 80GB HBM3`."""
    # Whole words: an A10G has half the peak of an A10.
    found = [key for key in PEAK_BF16_FLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_BF16_FLOPS[max(found, key=len)] if found else None


def assumed_save_seconds(num_parameters: int) -> float:
    """Estimate the seconds of a checkpoint before the first one is measured."""
    # 12 bytes per parameter (fp32 master weights and two moments) at a pessimistic 100 MB/s per rank.
    return 12.0 * num_parameters / distributed.world_size() / 1e8


def row_spans(rows: torch.Tensor) -> list[list[int]]:
    """Turn row indices of any order and shape into [first, last] spans. A repeated row starts a new span."""
    # Spans keep a line of metrics.jsonl short: consecutive rows are the usual case.
    spans: list[list[int]] = []
    for row in rows.flatten().sort().values.tolist():
        if spans and row == spans[-1][1] + 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    return spans


def peak_memory_gib() -> float:
    """Return this rank's peak memory so far in GiB: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux reports ru_maxrss in KiB (macOS in bytes).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
