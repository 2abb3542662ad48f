"""Memory options of `engine`: tiled loss, tiled MLP, activation offload.

They change results only by rounding. Families that do not support an option are refused by their architecture alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from clex_train.config.engine import EngineConfig
from clex_train.engine import activation_offload, tiled_mlp, token_loss
from clex_train.engine.tiled_loss import Logits, implementation, tiled_cross_entropy
from clex_train.model_config.meta_models import model_on_meta
from clex_train.model_config.size import num_parameters
from clex_train.utils import log
from clex_train.utils.errors import ConfigError

logger = log.get(__name__)


def check(engine: EngineConfig, arch: PretrainedConfig, trust_remote_code: bool = False) -> None:
    """Raise `ConfigError`, naming the model type, for an option that an architecture does not support."""
    if engine.tiled_loss is None and engine.tiled_mlp is None:
        return
    model = model_on_meta(arch, trust_remote_code)
    if engine.tiled_mlp is not None:
        try:
            tiled_mlp.find(decoder_layers(model))
        except tiled_mlp.NotTokenwise as error:
            raise ConfigError(
                "engine.tiled_mlp", engine.tiled_mlp, f"model_type={arch.model_type}: {error}; set it to null"
            ) from error
    if engine.tiled_loss is not None and not _loss_matches_logits(model):
        raise ConfigError(
            "engine.tiled_loss",
            engine.tiled_loss,
            f"model_type={arch.model_type} computes its loss from more than its "
            "output layer, logit scaling and soft-capping (a router's loss?); set it to null",
        )


def install(model: PreTrainedModel, engine: EngineConfig) -> None:
    """Apply the memory options, after activation checkpointing and before the engine is built."""
    install_tiles(model, engine)
    if engine.offload_activations:
        activation_offload.install(model)


def install_tiles(model: PreTrainedModel, engine: EngineConfig) -> None:
    """Install the tiled loss and the tiled MLPs as configured."""
    if engine.tiled_mlp is not None:
        tiled_mlp.install(tiled_mlp.find(decoder_layers(model)), engine.tiled_mlp)
    if engine.tiled_loss is not None:
        token_loss.install_tiles(model, engine.tiled_loss)


def announce(model: PreTrainedModel, engine: EngineConfig, device: torch.device) -> None:
    """Log the active options, and those without effect on this device."""
    if engine.tiled_loss is not None:
        head: Any = model.get_output_embeddings()
        chosen = implementation(device, head.bias is not None, Logits.from_config(model.config))
        by = "in PyTorch" if chosen is tiled_cross_entropy else "by Liger's fused kernel, which chooses its own size"
        logger.info("engine.tiled_loss=%d: the loss is computed in tiles, %s", engine.tiled_loss, by)
    if engine.offload_activations and device.type == "cpu":
        logger.info("engine.offload_activations=true has no effect: the layers run on a CPU")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Find the decoder layers: the module list with the most parameters."""
    # Families call them layers, h, blocks or block; encoders of other modalities are smaller.
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=num_parameters)


def recompute_layers(model: PreTrainedModel) -> None:
    """Enable activation checkpointing: keep only each decoder layer's input for the backward pass."""
    # transformers renamed the method in 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # The reentrant variant needs inputs that require gradients, and torch advises against it.
    enable({"use_reentrant": False})


class _Given(nn.Module):
    """Fake decoder that returns given hidden states for any input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


def _loss_matches_logits(model: Any) -> bool:
    """Return True if a model's own code computes the same loss as the tiled loss from the same hidden states.

    `model` is on the meta device, and gets its own parts back.
    """
    # Only a trial shows this: families differ in code, not in a config key.
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden, small = torch.randn(1, 6, 4, generator=generator), nn.Linear(4, head.out_features, head.bias is not None)
    # Large logits, or a soft cap would not show within the tolerance.
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=20.0, generator=generator)
    labels = torch.randint(head.out_features, (1, 6), generator=generator)
    targets = token_loss.shifted(labels)[0]
    with torch.no_grad(), _replaced(model, small, _Given(hidden)):
        try:
            own = model(input_ids=labels, labels=labels, use_cache=False).loss
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            # It needs more of its decoder than hidden states.
            return False
        total = tiled_cross_entropy(hidden[0], targets, small.weight, small.bias, 4, Logits.from_config(model.config))
    return bool(torch.isclose(own.float(), total / token_loss.num_scored(targets), rtol=1e-4))


@contextmanager
def _replaced(model: Any, head: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Give a model another output layer and decoder inside."""
    own_head, own_decoder = model.get_output_embeddings(), model.base_model
    model.set_output_embeddings(head)
    setattr(model, model.base_model_prefix, decoder)
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, own_decoder)
        model.set_output_embeddings(own_head)
