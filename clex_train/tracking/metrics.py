"""Metrics of a training step: throughput, MFU, memory, and the row indices as spans."""

import resource

import torch

from clex_train.utils import distributed

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bf16 peak in FLOP/s by the vendor's datasheet, for GPUs whose CUDA name contains the key."""


def flops_per_token(num_parameters: float, num_layers: int, num_heads: int, head_dim: int, seq_len: int) -> float:
    """Estimate the FLOPs of forward and backward for one token: 6 N + 6 * layers * heads * head_dim * S.

    N counts the parameters that take part in matrix products (PaLM, arXiv 2204.02311, appendix B).
    """
    # PaLM's attention term, 12 * ..., counts the full score matrix; a causal mask needs half. Recomputed activations
    # are not counted, which makes this MFU and not HFU.
    return 6.0 * num_parameters + 6.0 * num_layers * num_heads * head_dim * seq_len


def speed(step: int, tokens: int, seconds: float, flops_of_a_token: float) -> dict[str, float]:
    """Compute the metrics of step `step` (0-based), in which all ranks together read `tokens` tokens in `seconds`."""
    figures = {
        "tokens": (step + 1) * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "memory_gib": peak_memory_gib(),
    }
    mfu = model_flops_utilisation(tokens / seconds, flops_of_a_token, distributed.world_size())
    return figures if mfu is None else figures | {"mfu": mfu}


def model_flops_utilisation(tokens_per_second: float, flops_of_a_token: float, world_size: int) -> float | None:
    """Compute the share of the GPUs' bf16 peak that the step reached; None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_BF16_FLOPS.items() if key in name), None)
    return None if peak is None else tokens_per_second * flops_of_a_token / (peak * world_size)


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
