"""Figures of a training step: pure functions of counts, shapes and seconds."""

import resource

import torch

from clex_train.utils import distributed

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bf16 peak by the vendor's datasheet, for GPUs whose CUDA name contains the key."""


def flops_per_token(num_parameters: float, num_layers: int, num_heads: int, head_dim: int, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token: 6 N + 6 * layers * heads * head_dim * S.

    N counts the parameters that take part in matrix products. The second term is the causal half of the score and
    value products (PaLM, arXiv 2204.02311, appendix B, halved). Recomputation earns no credit.
    """
    return 6.0 * num_parameters + 6.0 * num_layers * num_heads * head_dim * seq_len


def speed(step: int, tokens: int, seconds: float, flops_of_a_token: float) -> dict[str, float]:
    """Figures of step `step` (0-based), in which all ranks read `tokens` tokens in `seconds`."""
    figures = {
        "tokens": (step + 1) * tokens,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "memory_gib": peak_memory_gib(),
    }
    mfu = model_flops_utilisation(tokens / seconds, flops_of_a_token, distributed.world_size())
    return figures if mfu is None else figures | {"mfu": mfu}


def model_flops_utilisation(tokens_per_second: float, flops_of_a_token: float, world_size: int) -> float | None:
    """Share of the GPUs' datasheet bf16 peak that the step reached; None on a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_BF16_FLOPS.items() if key in name), None)
    return None if peak is None else tokens_per_second * flops_of_a_token / (peak * world_size)


def assumed_save_seconds(num_parameters: int) -> float:
    """What a checkpoint may take before one was measured: master weights and two moments at 100 MB/s from each rank."""
    return 12.0 * num_parameters / distributed.world_size() / 1e8


def row_spans(rows: torch.Tensor) -> list[list[int]]:
    """Indices of rows in any order and shape as [first, last] spans; a row that occurs twice begins a new one."""
    spans: list[list[int]] = []
    for row in rows.flatten().sort().values.tolist():
        if spans and row == spans[-1][1] + 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    return spans


def peak_memory_gib() -> float:
    """Highest memory of this rank so far, in GiB: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
