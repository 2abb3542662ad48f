"""LoRA layers of peft, put into a model in place: the model stays an instance of its own class, under its own names.

An adapted layer W becomes a module with `base_layer` (W, frozen), `lora_A` and `lora_B`. Attention, rotary module,
output layer and config of the model are untouched, so whatever else is installed on them goes on working.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from clex_train.adapters.trained_set import TrainedSet, suffixes
from clex_train.config.adapter import AdapterConfig
from clex_train.utils import seeding
from clex_train.utils.errors import ConfigError
from clex_train.utils.versions import install_command

ADAPTER = "default"
"""Name of the only adapter, part of the names of its parameters."""


def require_peft(config: AdapterConfig) -> None:
    """Raise `ConfigError`, with the command that installs it, if adapters are configured and peft is missing."""
    if config.is_used and find_spec("peft") is None:
        raise ConfigError("adapter.name", config.name.value, f"peft is not installed: {install_command('adapters')}")


def inject(model: PreTrainedModel, trained: TrainedSet, seed: int) -> None:
    """Put the adapters into a loaded model, and freeze every weight that the run does not train.

    Call it before other code takes parameters of the layers (tiled MLPs) and before the engine is built. Weights may be
    sharded by ZeRO-3: only the new ones are whole until then. Every rank draws the same adapters.
    """
    peft = library(trained.config)
    torch.manual_seed(seeding.torch_seed(seed, "adapter"))
    peft.inject_adapter_in_model(peft_config(model, trained), model, adapter_name=ADAPTER)
    for name in trained.whole:
        # On the model's own module: peft's `modules_to_save` would hold a second, whole copy on every rank.
        model.get_submodule(name).requires_grad_(True)


def remove(model: PreTrainedModel) -> None:
    """Put the model's own layers back, without the adapters."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    model.__dict__.pop("peft_config", None)


def peft_config(model: nn.Module, trained: TrainedSet, base: str | None = None) -> Any:
    """Return peft's configuration of the adapters; `base` is the path or name of the model below them."""
    config, names = trained.config, [name for name, _ in model.named_modules()]
    return library(config).LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=config.r,
        # A whole number where it is one: some programs that read the file expect an int.
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        lora_dropout=config.dropout,
        target_modules=suffixes(trained.adapted, names),
        bias="none",
    )


def library(config: AdapterConfig) -> ModuleType:
    """Import peft, which takes seconds. Raises `ConfigError` if it is missing."""
    require_peft(config)
    return import_module("peft")
