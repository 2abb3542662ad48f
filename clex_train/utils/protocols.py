"""Interfaces of objects that libraries make: DeepSpeed's engine, a causal LM and its tokenizer of transformers.

They name what is used here and nothing else, so that a stand-in in a test, or another engine, is checked against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # Programs that only tokenise need no torch.
    from torch import Tensor, nn


class ParamGroups(Protocol):
    """An optimizer, of torch or wrapped by ZeRO, by its groups of parameters."""

    param_groups: list[dict[str, Any]]


class Engine(Protocol):
    """A DeepSpeed engine: the module that it wraps, its optimizer and its checkpoints. All methods are collective."""

    module: nn.Module
    optimizer: ParamGroups

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switch dropout on or off."""
        ...

    def backward(self, loss: Tensor) -> object:
        """Add up the gradients of `loss`, scaled by gradient accumulation."""
        ...

    def step(self) -> object:
        """Count a micro-batch, and update the weights after the last one of a step."""
        ...

    def destroy(self) -> None:
        """Remove hooks and release memory."""
        ...

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the rows of a micro-batch on each rank."""
        ...

    def zero_optimization_stage(self) -> int:
        """Return the stage of ZeRO, 0 to 3."""
        ...

    def was_step_applied(self) -> bool:
        """Tell whether the last update was not skipped; known to ZeRO's optimizers alone."""
        ...

    def get_global_grad_norm(self) -> Tensor | float | None:
        """Return the norm of the last step's gradient before clipping, which may still be on the device."""
        ...

    def save_checkpoint(self, save_dir: str, tag: str, *, save_latest: bool) -> object:
        """Write this rank's files to `save_dir/tag`."""
        ...

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, Any]:
        """Read this rank's files; (path, None if there are none; client state)."""
        ...


class CausalLM(Protocol):
    """A causal LM of transformers, or an engine around it, as a function of token ids."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return an output with `logits` [B, S, V], or the loss where a tiled loss is installed."""
        ...


class Tokenizer(Protocol):
    """A fast tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __len__(self) -> int:
        """Return the size of the vocabulary with added tokens."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Encode a text; the ids are under `input_ids`."""
        ...

    def decode(self, token_ids: Sequence[int] | int, *, skip_special_tokens: bool = False) -> Any:
        """Return the text of token ids."""
        ...

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> Any:
        """Return the vocabulary's entries of ids."""
        ...
