"""The mean of a run's last checkpoints as one model: a uniform average of its weights and of its CLEX field.

    w = (w_1 + ... + w_K) / K for every weight, in float64, rounded once to the type of the run's weights

(Stochastic weight averaging, arXiv 1803.05407; of the checkpoints of language models, arXiv 2209.14981.) theta(t) is
not linear in the field, so it is solved from the averaged field, whose bounds are checked like those of any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clex_train.checkpoint import weights
from clex_train.checkpoint.listing import Found
from clex_train.checkpoint.store import Checkpoints
from clex_train.checkpoint.weights import StoredWeights
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.data import build as data
from clex_train.data import conversations
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import architecture
from clex_train.models.initial_field import starting_field
from clex_train.models.load import LoadedModel, trained_architecture
from clex_train.models.tokenizer import training_tokenizer
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import install_native
from clex_train.rope.patch import install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.solver import UnstableField
from clex_train.scaling.static_rope import StaticRope
from clex_train.tracking import saved_config
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer


@dataclass(frozen=True)
class Plan:
    """A mean that passed every check; no weight was read yet."""

    config: Config
    """Configuration of the run."""
    stored: list[StoredWeights]
    loaded: LoadedModel
    """The model on the meta device, with the averaged field and its table."""
    tokenizer: Tokenizer

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return [each.step for each in self.stored]

    def average(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights by name, in the type of training. Host memory holds this one copy of them."""
        # The newest checkpoint decides: a run that resumed keeps its precision, so all have the same type.
        return dict(weights.mean(self.stored, self.stored[-1].dtype))


def plan(run: Path, last: int) -> Plan:
    """Verify the `last` newest checkpoints of a run folder, and solve theta(t) of their averaged field.

    Raises:
        ConfigError: the folder is no run, has too few or damaged checkpoints, they hold different parameters, or the
            averaged field is out of bounds.
    """
    config = saved_config.read(run / saved_config.CONFIG)
    require(
        not config.adapter.is_used,
        "run",
        run,
        f"was trained with adapter={config.adapter.name.value}: its checkpoints hold adapters alone, and the mean of "
        "their factors A and B is not that of the products; use final/",
    )
    found = weights.newest(run / "checkpoints", last)
    # Mapped files stay readable even if a run that is still training removes the checkpoint meanwhile.
    stored = [weights.open_weights(each) for each in found]
    names = [str(each.path) for each in stored]
    weights.require_alike("checkpoint", [each.shapes for each in stored], names)
    loaded, tokenizer = _without_weights(config, found[-1], stored[-1].dtype)
    shapes = {name: parameter.shape for name, parameter in loaded.model.named_parameters()}
    weights.require_alike("checkpoint", [shapes, stored[-1].shapes], [architecture.name(config.model), names[-1]])
    if (learned := loaded.learned) is not None:
        _average_field(config, loaded, learned, found)
    return Plan(config, stored, loaded, tokenizer)


def _without_weights(config: Config, newest: Found, dtype: torch.dtype) -> tuple[LoadedModel, Tokenizer]:
    """Build the model of a run on the meta device, with what `write_final` reads of it, and load its tokenizer."""
    arch = architecture.to_read(config.model)
    tokenizer = training_tokenizer(config.model, arch, _store_tokenizer(config))
    conversations.use_template(tokenizer, data.open_existing_stores(config.data))
    length, trained = architecture.context_length(config.model, arch), trained_architecture(config, arch)
    require(
        newest.manifest.architecture == architecture.digest(trained),
        f"checkpoint {newest.path}",
        None,
        f"was trained on another architecture than that of {architecture.name(config.model)} today; restore the "
        "config.json of the run's base model",
    )
    model = model_on_meta(trained, config.model.trust_remote_code)
    # The type of training: `engine.precision=auto` may mean another one on this machine. It is stated in config.json.
    model.to(dtype)
    install = install_rotary if config.scaling.name is Method.clex else install_native
    loaded = LoadedModel(model, install(model, length), length, lambda_mask=config.attention.lambda_mask)
    if config.scaling.name is Method.clex:
        loaded.clex, loaded.log_scale = starting_field(config, base_rope(loaded.handle))
        loaded.t_factor = config.scaling.t_factor
    if config.scaling.name is Method.static:
        factor = config.scaling.factor_for(config.data.seq_len, length)
        start = replace(recipes.spectrum_at(loaded.handle, factor), t=factor)
        loaded.static = recipes.learned_module(config.scaling, loaded.handle, start)
    return loaded, tokenizer


def _store_tokenizer(config: Config) -> Path:
    """Return the tokenizer of the run's token store; an empty path where the run takes another."""
    if config.model.tokenizer or config.model.is_pretrained:
        # The store may be on another machine by now.
        return Path()
    return next(iter(data.open_stores(config.data).values())).tokenizer_path


def _average_field(config: Config, loaded: LoadedModel, learned: Clex | StaticRope, found: Sequence[Found]) -> None:
    """Give the model the mean of the learned frequencies' weights, and the table of that."""
    fields = [weights.open_field(each, Checkpoints.ode_file) or {} for each in found]
    names = [f"{each.path / Checkpoints.ode_file}" for each in found]
    weights.require_alike(
        "checkpoint",
        [{name: tensor.shape for name, tensor in state.items()} for state in (learned.state_dict(), *fields)],
        ["the field of config.yaml", *names],
    )
    averaged = {
        name: torch.stack([field[name].double() for field in fields]).mean(dim=0)
        for name, _ in learned.named_parameters()
    }
    # Frequencies of the base, and the solver's steps, are not learned.
    learned.load_state_dict({**fields[-1], **averaged})
    try:
        # A mean of fields is a point that training never visited, so the checks of a checkpoint are due again.
        learned.check_residual(config.scaling.max_residual)
        learned.refine()
        loaded.solve_table()
    except UnstableField as error:
        remedy = f"{error.what}, in the mean of their fields; average fewer checkpoints"
        raise ConfigError("last", len(found), remedy) from error
