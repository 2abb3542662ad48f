"""Merged weights of a model with adapters, and the adapter's own files, both from weights gathered on one rank.

W + (alpha / r) B A,    computed in float32 and rounded once to the type of W
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from clex_train.adapters.lora import ADAPTER, peft_config
from clex_train.adapters.trained_set import TrainedSet, suffixes

BASE = ".base_layer."
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"
FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins the names of tensors in peft's files."""


def merge(weights: dict[str, Tensor], trained: TrainedSet) -> dict[str, Tensor]:
    """Return the weights under the names of the model without adapters; `weights` is emptied on the way.

    An empty dictionary, which ranks other than 0 have, stays empty.
    """
    scale, merged = trained.config.alpha / trained.config.r, {}
    # Emptied layer by layer, so that the host holds the model once.
    for name in [name for name in weights if not name.endswith((DOWN, UP))]:
        tensor = weights.pop(name)
        layer, is_adapted, last = name.partition(BASE)
        if is_adapted and last == "weight":
            up, down = weights.pop(layer + UP), weights.pop(layer + DOWN)
            # Rounding B A to bf16 before the sum would lose the small change that training made.
            tensor = torch.addmm(tensor.float(), up.float(), down.float(), alpha=scale).to(tensor.dtype)
        merged[f"{layer}.{last}" if is_adapted else name] = tensor
    return merged


def tensors(weights: Mapping[str, Tensor], trained: TrainedSet) -> dict[str, Tensor]:
    """Return the adapter's tensors under peft's names: A, B, and the modules that are trained whole.

    An empty dictionary, which ranks other than 0 have, gives an empty one.
    """
    named = {name: tensor for name, tensor in weights.items() if name.endswith((DOWN, UP))}
    # Without the adapter's own name, which the program that loads it chooses.
    found = {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in named.items()}
    for module in trained.whole:
        own = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] == module}
        found |= {PREFIX + name: tensor for name, tensor in own.items()}
        if own and (head := trained.tied.get(module)):
            # peft copies modules, which unties them: the output layer needs the trained weights under its own name.
            found[f"{PREFIX}{head}.weight"] = own[f"{module}.weight"].clone()
    return found


def write(
    folder: Path, model: PreTrainedModel, found: dict[str, Tensor], trained: TrainedSet, base: str | None
) -> None:
    """Write `adapter/` below a model directory, in the format that `PeftModel.from_pretrained` reads.

    `found` is the result of `tensors`, `model` the model without adapters, and `base` its path or name.
    """
    target = folder / FOLDER
    target.mkdir()
    config = peft_config(model, trained, base)
    whole = [*trained.whole, *trained.tied.values()]
    # Named here alone: in training they are the model's own modules.
    config.modules_to_save = suffixes(whole, [name for name, _ in model.named_modules()]) or None
    config.inference_mode = True
    config.save_pretrained(target)
    save_file(found, target / WEIGHTS, metadata={"format": "pt"})
