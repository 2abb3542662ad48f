"""Interfaces of objects that libraries make: DeepSpeed's engine, a causal LM and its tokenizer of transformers.

They name what is used here and nothing else, so that a stand-in in a test, or another engine, is checked against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # At run time this module needs no torch, which programs that only tokenize do not import.
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
    """A causal LM of transformers."""

    config: Any
    """Its architecture, a `PretrainedConfig`."""
    base_model: nn.Module
    """The decoder, without the output layer."""
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return an output with `logits` [B, S, V], or the loss alone where a tiled loss is installed."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of token ids."""
        ...

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output layer."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Iterate over all modules."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over all modules with their names."""
        ...


class Tokenizer(Protocol):
    """A fast tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    """Without added tokens; `len` counts them."""
    backend_tokenizer: Any
    """The `tokenizers.Tokenizer` below it."""

    def __len__(self) -> int:
        """Return the number of ids."""
        ...

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Encode a text with the special tokens that the tokenizer adds; the ids are under `input_ids`."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Return the text of ids."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Write turns of a conversation as the model was trained to read them."""
        ...

    def save_pretrained(self, save_directory: Path) -> object:
        """Write the tokenizer's files."""
        ...
