"""Config group `engine`: ZeRO stage, precision, micro-batches, memory savers and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_RANKS, MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


class Offload(Enum):
    """Devices that DeepSpeed can keep parameters or optimizer states on."""

    none = "none"
    optimizer = "optimizer"
    all = "all"


class Precision(Enum):
    """Floating-point types of training."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Liger(Enum):
    """Choices of whether kernels of liger-kernel replace norms and MLPs."""

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
"""Upper bounds that catch typing errors."""


@dataclass
class EngineConfig:
    """The `engine` group: DeepSpeed, batch layout, memory options."""

    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    offload: Offload = Offload.none
    """Keep optimizer state (`optimizer`), or optimizer state and parameters (`all`), in host memory."""
    micro_batch: int | None = 1
    """Rows per rank in one forward and backward pass, at least 1; null: all rows of an accumulation step."""
    accumulation: int | None = None
    """Micro-batches per optimizer step (gradient accumulation); null: follows from optim.batch_rows and the ranks."""
    sequence_parallel: int = 1
    """Ranks that share each sequence (Ulysses), each with an equal part; must divide the ranks and the heads."""
    precision: Precision = Precision.auto
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers (layers * tokens * width) in host memory; no effect on a CPU."""
    tiled_loss: int | None = None
    """Tokens per tile of the loss, which bounds the logits in memory, such as 1024; null: the whole micro-batch."""
    tiled_mlp: int | None = None
    """Tokens per tile of an MLP, recomputed in the backward pass, such as 4096; null: no tiling."""
    liger: Liger = Liger.auto
    """RMSNorm and SwiGLU kernels of liger-kernel: `auto` on a GPU if installed, `always` requires them."""
    timeout: float = 30.0
    """Minutes that a collective waits for a rank before the run fails, above 0."""
    world_size: int | None = None
    """Ranks for the memory estimate of `dry_run`; a real run uses those of the launcher."""

    def __post_init__(self) -> None:
        require_at_most(self, "engine.", MOST)
        # A stage is an int in the schema, since Hydra enums cannot be numbers.
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(self.micro_batch is None or self.micro_batch >= 1, "engine.micro_batch", self.micro_batch, "at least 1")
        require(
            self.accumulation is None or self.accumulation >= 1, "engine.accumulation", self.accumulation, "at least 1"
        )
        # Combinations that DeepSpeed would ignore or reject after minutes of loading are refused here.
        require(
            self.activation_checkpointing or not self.offload_activations,
            "engine.offload_activations",
            self.offload_activations,
            "needs engine.activation_checkpointing=true, which keeps only the input of each layer",
        )
        require(self.sequence_parallel >= 1, "engine.sequence_parallel", self.sequence_parallel, "at least 1 rank")
        for name, tile_len in (("tiled_loss", self.tiled_loss), ("tiled_mlp", self.tiled_mlp)):
            require(tile_len is None or tile_len >= 1, f"engine.{name}", tile_len, "at least 1 token, or null")
        require(self.timeout > 0, "engine.timeout", self.timeout, "minutes, greater than 0")
        require(
            self.world_size is None or self.world_size >= 1, "engine.world_size", self.world_size, "at least 1 rank"
        )
        # Without ZeRO, DeepSpeed has no sharded optimizer whose state it could move to the host.
        require(
            self.offload is Offload.none or self.zero_stage >= 1,
            "engine.offload",
            self.offload.name,
            "needs engine.zero_stage 1 or higher",
        )
        # Only ZeRO-3 gathers parameters layer by layer, so only there they can live on the host.
        require(
            self.offload is not Offload.all or self.zero_stage == 3,
            "engine.offload",
            self.offload.name,
            "offloading parameters needs engine.zero_stage=3",
        )
