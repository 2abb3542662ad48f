"""Small models with adapters whose B is not zero, so that what the adapters do shows."""

import torch
from transformers import PreTrainedModel

from clex_train.adapters import lora, trained_set
from clex_train.adapters.trained_set import TrainedSet
from clex_train.config.adapter import AdapterConfig, AdapterKind

LONGLORA = {"train_embeddings": True, "train_norms": True}


def settings(**given: object) -> AdapterConfig:
    """Configure adapters of rank 4 and scale 2."""
    return AdapterConfig(name=AdapterKind.lora, r=4, alpha=8.0, **given)


def adapt(model: PreTrainedModel, **given: object) -> TrainedSet:
    """Put adapters into a model and move all that is trained, as training would."""
    trained = trained_set.choose(model, settings(**given))
    lora.inject(model, trained, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return trained


def gathered(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copy all parameters, as `engine.deepspeed.consolidated_state_dict` does."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
