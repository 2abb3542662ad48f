"""Bytes that each rank holds for parameters, gradients and optimizer under DeepSpeed's ZeRO; arithmetic only.

With P parameters, N ranks, b bytes a parameter and a bytes an accumulated gradient (ZeRO, arXiv 1910.02054, section 5):

    stage      parameters      gradients      optimizer (AdamW: master copy and two moments in float32)
    0          b P             b P            12 P    (8 P in float32, which needs no master copy)
    1          b P             b P            12 P/N
    2          b P             a P/N          12 P/N
    3          b P/N + live    a P/N          12 P/N

The rest is DeepSpeed's: gathered layers that are kept for the backward pass, buckets, the float32 copy of the
gradients that an update works on. Checked against a census of a real engine's tensors in tests/engine/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLOAT32 = 4
MASTER, MOMENTS = FLOAT32, 2 * FLOAT32
GRADIENTS_ON_HOST = FLOAT32
# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py).
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """Settings that place a model's state; sizes of elements in bytes, buckets and distances in elements."""

    stage: int
    world_size: int
    parameter: int
    gradient: int
    on_gpu: bool
    accumulation: int = 1
    checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = REDUCE_BUCKET
    prefetch_bucket: int = PREFETCH_BUCKET
    max_live: int = MAX_LIVE
    max_reuse_distance: int = MAX_REUSE_DISTANCE
    sub_group: int = SUB_GROUP

    @property
    def gathers(self) -> bool:
        """True if a layer's parameters are gathered before use and released after."""
        return self.stage == 3 and (self.world_size > 1 or self.offload_parameters)

    def share(self, count: int) -> float:
        """Return the elements of `count` on one rank when they are split over all."""
        return count / self.world_size


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the device and in the host's memory, for one rank."""

    device: float
    host: float = 0.0


def sharding(
    settings: dict[str, Any], world_size: int, dtype: torch.dtype, checkpointing: bool, on_gpu: bool
) -> Sharding:
    """Read the sizes off the dictionary that DeepSpeed is given; what it leaves out has DeepSpeed's defaults."""
    zero = settings["zero_optimization"]
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype")
    return Sharding(
        stage=zero["stage"],
        world_size=world_size,
        parameter=dtype.itemsize,
        gradient={None: dtype.itemsize, "fp32": 4, "fp16": 2, "bf16": 2}[accumulated],
        on_gpu=on_gpu,
        accumulation=settings["gradient_accumulation_steps"],
        checkpointing=checkpointing,
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)),
        max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
        max_reuse_distance=int(zero.get("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)),
        sub_group=int(zero.get("sub_group_size", SUB_GROUP)),
    )


def parameters(s: Sharding, blocks: Sequence[int]) -> MemoryUse:
    """Compute the bytes of parameters; `blocks` are their numbers in the order of use: embedding, layers, head."""
    count = sum(blocks)
    if s.stage < 3:
        return MemoryUse(s.parameter * count)
    kept = s.parameter * s.share(count)
    live = s.parameter * live_parameters(s, blocks) if s.gathers else 0.0
    return MemoryUse(live, kept) if s.offload_parameters else MemoryUse(kept + live)


def live_parameters(s: Sharding, blocks: Sequence[int]) -> int:
    """Count the most parameters of ZeRO-3 that are gathered on a rank at once.

    DeepSpeed prefetches until `max_live` are gathered. Beyond that it keeps a block after its forward pass if fewer
    than `max_reuse_distance` parameters are used before the block's next use: those after it, in the forward and the
    backward pass, and layers once more if they are recomputed.
    """
    passes = 3 if s.checkpointing else 2
    kept = distance = 0
    for index, block in enumerate(reversed(blocks)):
        kept += block if distance < s.max_reuse_distance else 0
        distance += (2 if index == 0 else passes) * block
    return min(sum(blocks), max(kept, *blocks, s.max_live if s.prefetch_bucket else 0))


def gradients(s: Sharding, count: int) -> MemoryUse:
    """Compute the bytes of gradients of `count` trainable parameters: accumulated ones and reduction buckets."""
    if s.stage == 0:
        return MemoryUse(s.parameter * count)
    bucket = s.parameter * (s.reduce_bucket if s.on_gpu else min(s.reduce_bucket, count))
    if s.stage == 1:
        return MemoryUse(s.parameter * count + bucket)
    # Stage 3 keeps its bucket, and copies it together for each reduce-scatter; stage 2 allocates one a backward pass.
    buckets = bucket + (s.parameter * min(s.reduce_bucket, count) if s.stage == 3 else 0)
    kept = s.gradient * s.share(count)
    return MemoryUse(buckets, kept) if s.offload_optimizer else MemoryUse(kept + buckets)


def optimizer(s: Sharding, count: int) -> MemoryUse:
    """Compute the bytes of AdamW's state for `count` trainable parameters: float32 master copy and two moments."""
    if s.stage == 0:
        return MemoryUse((MOMENTS + (MASTER if s.parameter < FLOAT32 else 0)) * count)
    state = (MASTER + MOMENTS) * s.share(count)
    if not s.offload_optimizer:
        return MemoryUse(state)
    staging = s.parameter if s.stage < 3 else 0
    return MemoryUse(0.0, state + (GRADIENTS_ON_HOST + staging) * s.share(count))


def update_workspace(s: Sharding, count: int) -> MemoryUse:
    """Compute the bytes that the optimizer's step allocates: gradients as one float32 vector, AdamW's temporaries.

    On a GPU AdamW is fused and has none; on a CPU it takes two vectors. ZeRO-3 updates one sub-group at a time. With
    the optimizer in host memory DeepSpeed's CPUAdam works in place.
    """
    if s.offload_optimizer or (s.stage == 0 and s.parameter == FLOAT32):
        return MemoryUse(0.0)
    elements = s.share(count) if s.stage else float(count)
    if s.stage == 3:
        elements = min(elements, s.sub_group)
    if s.on_gpu:
        return MemoryUse((FLOAT32 + (s.gradient if s.parameter < FLOAT32 else 0)) * elements)
    return MemoryUse((FLOAT32 + 2 * FLOAT32) * elements)


def ode(num_pairs: int, num_hidden: int, num_steps: int) -> MemoryUse:
    """Compute the host bytes of the vector field: float32 weights, gradients and moments, and the graph of a solve.

    Each of the 4 evaluations of a Runge-Kutta step keeps its input [P] and the hidden layer before and after [H].
    """
    weights = (FLOAT32 + GRADIENTS_ON_HOST + MOMENTS) * 2 * num_pairs * num_hidden
    return MemoryUse(0.0, weights + 4 * num_steps * FLOAT32 * (2 * num_pairs + 2 * num_hidden))
