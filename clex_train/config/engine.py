"""DeepSpeed: ZeRO stage, precision, micro-batches, ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_RANKS, MOST_TOKENS, require, require_at_most


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"
    all = "all"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Liger(Enum):
    auto = "auto"
    always = "always"
    never = "never"


MOST = {
    "micro_batch": 2**20,
    "accumulation": 2**24,
    "sequence_parallel": MOST_RANKS,
    "tiled_loss": MOST_TOKENS,
    "tiled_mlp": MOST_TOKENS,
    "timeout": 60 * 24 * 30,
    "world_size": MOST_RANKS,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class EngineConfig:
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    offload: Offload = Offload.none
    """Keep the optimizer's state, or `all` (optimizer and parameters), in host memory."""
    micro_batch: int | None = 1
    """Rows per rank in one forward and backward; null: as many as the rank has to read between two accumulations."""
    accumulation: int | None = None
    """Micro-batches per optimizer step; by default what optim.batch_rows, micro_batch and the ranks ask for."""
    sequence_parallel: int = 1
    """Ranks that share each row, each holding as many of its tokens (Ulysses); divides the ranks and the heads."""
    precision: Precision = Precision.auto
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    offload_activations: bool = False
    """Keep in host memory what recomputed layers start from (layers * tokens * width); on a CPU it changes nothing."""
    tiled_loss: int | None = None
    """Tokens whose logits exist at a time in the loss, such as 1024; null: those of the whole micro-batch."""
    tiled_mlp: int | None = None
    """Tokens that an MLP takes at a time, such as 4096, run once more in the backward pass; null: all of them."""
    liger: Liger = Liger.auto
    """RMSNorm and SwiGLU by the kernels of liger-kernel: `auto` on a GPU that has it, `always` there or an error."""
    timeout: float = 30.0
    """Minutes that a collective may wait for a rank before the run fails."""
    world_size: int | None = None
    """Ranks assumed by `dry_run`'s memory estimate; a real run takes what the launcher gives."""

    def __post_init__(self) -> None:
        require_at_most(self, "engine.", MOST)
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(self.micro_batch is None or self.micro_batch >= 1, "engine.micro_batch", self.micro_batch, "at least 1")
        require(
            self.accumulation is None or self.accumulation >= 1, "engine.accumulation", self.accumulation, "at least 1"
        )
        require(
            self.activation_checkpointing or not self.offload_activations,
            "engine.offload_activations",
            self.offload_activations,
            "needs engine.activation_checkpointing=true, which keeps a layer's input alone",
        )
        require(
            self.sequence_parallel >= 1, "engine.sequence_parallel", self.sequence_parallel, "at least 1 rank a row"
        )
        for name, tile_len in (("tiled_loss", self.tiled_loss), ("tiled_mlp", self.tiled_mlp)):
            require(tile_len is None or tile_len >= 1, f"engine.{name}", tile_len, "at least 1 token, or null")
        require(self.timeout > 0, "engine.timeout", self.timeout, "minutes, greater than 0")
        require(
            self.world_size is None or self.world_size >= 1, "engine.world_size", self.world_size, "at least 1 rank"
        )
        require(
            self.offload is Offload.none or self.zero_stage >= 1,
            "engine.offload",
            self.offload.name,
            "needs engine.zero_stage 1 or higher",
        )
        require(
            self.offload is not Offload.all or self.zero_stage == 3,
            "engine.offload",
            self.offload.name,
            "offloading parameters needs engine.zero_stage=3",
        )
