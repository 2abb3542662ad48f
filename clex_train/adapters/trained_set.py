"""The parameters that a run with adapters trains: chosen by names of layers, counted before any weight is read.

    W x + (alpha / r) B A x,    A [r, in] random, B [out, r] zero at the start, W frozen

(LoRA, arXiv 2106.09685.) LongLoRA (arXiv 2309.12307) trains embeddings and norms whole beside the adapters.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from clex_train.config.adapter import AdapterConfig
from clex_train.model_config.size import num_parameters
from clex_train.models.memory_options import decoder_layers
from clex_train.utils.errors import ConfigError, require

ATTENTION, ALL_LINEAR = "attention", "all-linear"
MOST_SHOWN = 12
"""Names of layers that a message lists."""


@dataclass(frozen=True)
class TrainedSet:
    """Layers with an adapter, and modules that are trained whole."""

    config: AdapterConfig
    adapted: Mapping[str, tuple[int, int]]
    """Adapted linear layers by full name: numbers of inputs and outputs."""
    whole: Mapping[str, int]
    """Modules that are trained whole, by full name: their numbers of parameters."""
    tied: Mapping[str, str]
    """The trained input embedding, and the output layer that shares its weights; empty if they are apart or frozen."""
    frozen: int
    """Parameters of the model that are not trained."""

    @property
    def num_adapter(self) -> int:
        """Number of parameters that the adapters add."""
        return sum(self.config.r * sum(sizes) for sizes in self.adapted.values())

    @property
    def num_trained(self) -> int:
        """Number of trained parameters: adapters, and modules that are trained whole."""
        return self.num_adapter + sum(self.whole.values())

    def added(self, name: str) -> int:
        """Return the number of parameters that an adapter adds to a layer; 0 for a layer without one."""
        return self.config.r * sum(self.adapted.get(name, ()))

    def describe(self) -> Iterator[str]:
        """Yield the lines of a program's opening block: rank and layers, then the share of the parameters."""
        config = self.config
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in self.adapted}))
        beside = [text for text, on in (("embeddings", config.train_embeddings), ("norms", config.train_norms)) if on]
        also = f"; {' and '.join(beside)} trained whole" if beside else ""
        dropout = f", dropout {config.dropout:g}" if config.dropout else ""
        yield f"{config.name.value}, rank {config.r}, alpha {config.alpha:g}{dropout}, on {layers}{also}"
        total = self.num_trained + self.frozen
        share = f"{100 * self.num_trained / total:.2g} %"
        yield f"{self.num_trained:,} of {total:,} parameters are trained ({share}); final/ holds the merged model"


def choose(model: PreTrainedModel, config: AdapterConfig) -> TrainedSet:
    """Find the layers of a model, on any device, that `config` trains.

    Raises:
        ConfigError: a target is no linear layer of the decoder, or the model has no norm with weights.
    """
    linear = dict(_linear_layers(model))
    chosen = {name for target in config.targets for name in _matching(model, target, linear, config)}
    adapted = {name: (layer.in_features, layer.out_features) for name, layer in linear.items() if name in chosen}
    norms = dict(_norms(model)) if config.train_norms else {}
    require(
        bool(norms) or not config.train_norms,
        "adapter.train_norms",
        True,
        f"no norm of model_type={_type(model)} has weights; set it to false",
    )
    whole = {name: num_parameters(module) for name, module in norms.items()}
    tied = {}
    if config.train_embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = _name_of(model, embedding)
        whole[name] = num_parameters(embedding)
        # One tensor under two names: a program that loads the adapter has to replace both.
        tied = {name: _name_of(model, head)} if head is not None and head.weight is embedding.weight else {}
    return TrainedSet(config, adapted, whole, tied, num_parameters(model) - sum(whole.values()))


def identity(architecture: str, config: AdapterConfig) -> str:
    """Return the digest by which a checkpoint recognizes its run: that of the architecture, and of the adapter if any.

    Without an adapter it is `architecture` itself, so that checkpoints of earlier versions still fit.
    """
    if not config.is_used:
        return architecture
    facts = asdict(config) | {"name": config.name.value}
    # `save` changes what is written at the end, and nothing that is trained.
    del facts["save"]
    return hashlib.sha256(f"{architecture} {json.dumps(facts, sort_keys=True)}".encode()).hexdigest()


def suffixes(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the last parts of names, or the names themselves where the last part of one also ends another module."""
    # peft compares the ends of names. Short ones keep adapter_config.json readable, also for programs that parse it.
    wanted, rest = {*names}, [*others]
    short = {name.rpartition(".")[2] for name in wanted}
    is_unique = not any(other.endswith(tuple(short)) for other in rest if other not in wanted)
    return sorted(short if is_unique else wanted)


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the decoder layers; the output layer is none of them."""
    prefix = _name_of(model, decoder_layers(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"{prefix}."):
            yield name, module


def _matching(
    model: PreTrainedModel, target: str, linear: Mapping[str, nn.Linear], config: AdapterConfig
) -> Iterable[str]:
    if target == ALL_LINEAR:
        found = list(linear)
    elif target == ATTENTION:
        # By class and by attribute: families agree on neither (GPTNeoXAttention, self_attn, linear_attn, ...).
        blocks = [name for name, module in model.named_modules() if _is_attention(name, module)]
        found = [name for name in linear if any(name.startswith(f"{block}.") for block in blocks)]
    else:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
    if not found:
        known = sorted({_without_layer(name) for name in linear})
        more = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
        raise ConfigError(
            "adapter.targets",
            list(config.targets),
            f"the decoder layers of model_type={_type(model)} have no linear layer {target}; they have "
            f"{', '.join(known[:MOST_SHOWN])}{more}: name some of these, or `{ATTENTION}` or `{ALL_LINEAR}`",
        )
    return found


def _is_attention(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    return "attention" in type(module).__name__.lower() or "attn" in last or last == ATTENTION


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        # Norms without weights (OLMo) have nothing to train.
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False)):
            yield name, module


def _name_of(model: nn.Module, wanted: Any) -> str:
    names: Iterator[str] = (name for name, module in model.named_modules() if module is wanted)
    return next(names)


def _without_layer(name: str) -> str:
    """Return the part of a name behind the number of its decoder layer."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name


def _type(model: PreTrainedModel) -> str:
    return str(model.config.model_type)
