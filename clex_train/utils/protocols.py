"""Protocols of library objects: DeepSpeed's engine, transformers' causal LM and its tokenizer.

They declare only members that are used here, so type checks cover test doubles and other engines as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # At run time this module needs no torch, which programs that only tokenize do not import.
    from torch import Tensor, nn


class ParamGroups(Protocol):
    """Parameter groups of an optimizer, torch's own or wrapped by ZeRO."""

    param_groups: list[dict[str, Any]]


class Engine(Protocol):
    """DeepSpeed engine: a wrapped module, its optimizer and its checkpoints. Call all methods on every rank."""

    module: nn.Module
    optimizer: ParamGroups

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward pass."""
        ...

    def train(self, mode: bool = True) -> object:
        """Switch between training and evaluation mode, and with it dropout."""
        ...

    def backward(self, loss: Tensor) -> object:
        """Accumulate the gradients of `loss`, divided by the number of gradient accumulation steps."""
        ...

    def step(self) -> object:
        """Count a micro-batch; after the last one of an optimizer step, update the weights."""
        ...

    def destroy(self) -> None:
        """Remove hooks and free memory."""
        ...

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the micro-batch size per rank, in rows."""
        ...

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""
        ...

    def was_step_applied(self) -> bool:
        """Return True unless the last update was skipped; implemented by ZeRO's optimizers only."""
        ...

    def get_global_grad_norm(self) -> Tensor | float | None:
        """Return the last step's gradient norm before clipping; a tensor may still be on the device."""
        ...

    def save_checkpoint(self, save_dir: str, tag: str, *, save_latest: bool) -> object:
        """Write this rank's files to `save_dir/tag`."""
        ...

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, Any]:
        """Read this rank's files; return (path or None if there are none, client state)."""
        ...


class CausalLM(Protocol):
    """Causal LM of transformers."""

    config: Any
    """Architecture, a `PretrainedConfig`; `Any`, since each family has fields of its own."""
    base_model: nn.Module
    """Decoder without the output layer."""
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return an output with `logits` [B, S, V], or only the loss if a tiled loss is installed."""
        ...

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
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
    """Fast tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    """Number of ids without added tokens; `len` includes them."""
    added_tokens_decoder: Mapping[int, Any]
    """Added tokens by id, with `content` and `special`."""
    chat_template: Any
    """Jinja text of the chat template, several by name, or None."""
    backend_tokenizer: Any
    """Wrapped `tokenizers.Tokenizer`."""

    def __len__(self) -> int:
        """Return the number of ids, added tokens included."""
        ...

    def __call__(self, text: str) -> Mapping[str, Any]:
        """Encode a text, special tokens included; the ids are under `input_ids`."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Decode ids to text."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """Render a conversation with the model's chat template."""
        ...

    def save_pretrained(self, save_directory: Path) -> object:
        """Write the tokenizer's files."""
        ...
