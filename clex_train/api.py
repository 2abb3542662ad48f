"""CLEX on your own transformers causal LM: applied in one call, undone in another.

    clex = apply_clex(model, "runs/llama2_7b_clex/final")    the field that a run has trained
    model.generate(**inputs)                                  t = least upper bound of n / L, cached keys follow
    with clex.pinned(8): model.generate(**inputs)             t is fixed
    clex.undo()                                               the original model, to the bit

See docs/library.md for a guide; `rope.patch` does the work.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.attention.log_scaling import LogScaling, install_log_scaling
from clex_train.attention.token_scaling import TokenScaling
from clex_train.lm_infinite.install import apply_lm_infinite
from clex_train.model_config.context_length import context_in_config
from clex_train.model_config.rope_keys import rope_of
from clex_train.models import directory as model_directory
from clex_train.models import official
from clex_train.models.load import load_for_evaluation
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.rope.probe import find_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.utils.errors import ConfigError
from clex_train.utils.records import read_json

__all__ = ["AppliedClex", "apply_clex", "apply_lm_infinite", "load_for_evaluation"]

Source = str | Path | Clex | FrequencyTable
T_MAX = 16.0


@dataclass
class AppliedClex:
    """CLEX applied to one model; created by `apply_clex`."""

    handle: RotaryHandle
    """Control of the frequencies, beyond the methods here (`rope.patch`)."""
    table: FrequencyTable
    """theta(t) on the grid of values that `t` takes."""
    field: Clex | None
    """ODE behind the table, for training; None when a bare table was given."""
    log_scaling: LogScaling | TokenScaling
    clamp: bool = False
    restore: Callable[[], None] = lambda: None
    """Puts back the rotary module of one t, for a model that plain transformers loaded from a `final/`."""

    def pinned(self, t: float) -> AbstractContextManager[None]:
        """Use theta(t) for every call in the context; `ValueError` for a t off the table's grid."""
        return self.handle.pinned(t)

    def fixed(self, num_tokens: int) -> AbstractContextManager[None]:
        """Treat every call in the context as one of `num_tokens` tokens; this sets t and log-scaling."""
        return self.handle.fixed(num_tokens)

    def refresh(self) -> None:
        """Solve for the table again after training the field; `UnstableField` if the field is unusable."""
        assert self.field is not None, "a bare table has no field to solve"
        self.table = replace(_solve_table(self.field, self.handle.context_len), t_factor=self.table.t_factor)
        self.handle.use(self.table, self.clamp)

    def undo(self) -> None:
        """Restore the model, to the bit."""
        # Before the handle, whose `undo` drops its listeners.
        self.log_scaling.undo()
        self.handle.undo()
        self.restore()


def apply_clex(
    model: nn.Module,
    source: Source | None = None,
    *,
    context_len: int | None = None,
    t_max: float = T_MAX,
    log_scale: str | None = None,
    clamp: bool = False,
) -> AppliedClex:
    """Let the RoPE of `model` follow the length of each call, up to t_max * L tokens; weights are unchanged.

    Args:
        model: a transformers causal LM.
        source: a directory with a CLEX field (the `final/` of a run, or a checkpoint of the original code), a `Clex`, a
            `FrequencyTable`, or None for an untrained field: NTK scaling with alpha = 2t - 1 up to `t_max`.
        context_len: L in tokens, the context length of the base model; by default the source's, else the model's
            `max_position_embeddings`.
        t_max: largest scale factor of an untrained field.
        log_scale: a policy of `attention.log_scaling`; by default the source's, else `off`.
        clamp: serve calls beyond t_max * L at t_max with a warning, instead of refusing them.

    Raises:
        ConfigError: no RoPE or one that cannot be scaled, frequencies that do not fit the model, or a damaged source.
        ValueError: the model is patched already, or `log_scale` is unknown. Either way the model stays unchanged.
    """
    length = context_len or _recorded_context(source) or _own_context(model)
    # A `final/` states the RoPE of one t to others; the field starts from that of its base.
    restore = _use_base_rope(model, source)
    try:
        # Install first: the handle knows the model's own frequencies, which the source is checked against.
        handle = install_rotary(model, length)
    except Exception:
        restore()
        raise
    try:
        handle.require_scalable()
        # Everything below may refuse the source, and the model must then be as before.
        field, table, policy = _read(source, handle, t_max)
        handle.use(table, clamp)
        # Last, as it subscribes to the handle; `undo` goes in reverse order.
        scaling = install_log_scaling(model, log_scale or policy, length, handle.on_length, handle.on_call)
    except Exception:
        handle.undo()
        restore()
        raise
    return AppliedClex(handle, table, field, scaling, clamp, restore)


def _use_base_rope(model: nn.Module, source: Source | None) -> Callable[[], None]:
    """Build the rotary module of the base in a model that has the RoPE stated by `source`; return what undoes it."""
    if not isinstance(source, str | Path) or not _states_rope_of(Path(source), model.config):
        return lambda: None
    site = find_rotary(model)
    config: Any = site.module.config
    base = type(site.module)(model_directory.with_base_rope(Path(source), config))
    # Frequencies are a buffer, which lives with the model; ours are copied from it in float64.
    setattr(site.parent, site.name, base)
    return lambda: setattr(site.parent, site.name, site.module)


def _states_rope_of(directory: Path, config: Any) -> bool:
    """Tell whether a model's config has the RoPE of one t that config.json of a CLEX directory states."""
    if not model_directory.has_clex(directory) or model_directory.read_record(directory).stated_t is None:
        return False
    own = _factor_lists(rope_of(config))
    facts = read_json(directory / "config.json")
    # At the top, or in the part of the text model.
    return bool(own) and any(_factor_lists(each) == own for each in (facts, *facts.values()) if isinstance(each, dict))


def _factor_lists(facts: Mapping[str, Any]) -> list[list[float]]:
    """Return the factors of every layer type in `rope_parameters`."""
    parameters = facts.get("rope_parameters") or {}
    every = (parameters, *parameters.values())
    return [each["short_factor"] for each in every if isinstance(each, dict) and "short_factor" in each]


def _read(source: Source | None, handle: RotaryHandle, t_max: float) -> tuple[Clex | None, FrequencyTable, str]:
    """Return field, table and log-scaling policy of a source that fits the model."""
    if isinstance(source, FrequencyTable):
        return None, source, "off"
    base, policy, table = handle.base_inv_freq, "off", None
    if source is None:
        field = Clex(base, t_max)
    elif isinstance(source, Clex):
        field = source
    elif model_directory.has_clex(Path(source)):
        field, table, record = model_directory.read_clex(Path(source))
        policy = record.log_scale
    else:
        stored = official.read_official_field(Path(source), base)
        # The official code has no table; it is solved below, on the integers up to t_max.
        field, policy = stored.clex, stored.log_scale
    _require_same_base(field.base_inv_freq, base, source)
    return field, table or _solve_table(field, handle.context_len), policy


def _solve_table(field: Clex, context_len: int) -> FrequencyTable:
    """Solve for theta(t) on the integers up to t_max, within the field's tolerance."""
    return replace(field.table(scale_grid(field.t_max)), context_len=context_len)


def _require_same_base(found: Tensor, own: Tensor, source: Any) -> None:
    """Raise `ConfigError` if a field was trained on frequencies other than the model's."""
    name = source if isinstance(source, str | Path) else "the field"
    if len(found) != len(own):
        raise ConfigError(
            name,
            None,
            f"rotary dimension {2 * len(found)}, but the model's is {2 * len(own)}; apply it to its own base model",
        )
    # A field continues the frequencies it was trained on; rtol leaves room for frequencies stored in float32.
    if not torch.allclose(found.cpu(), own, rtol=1e-4, atol=0):
        j = int(((found.cpu() - own).abs() / own).argmax())
        raise ConfigError(
            name,
            None,
            f"starts from theta[{j}]={float(found[j]):.6g}, but the model's is {float(own[j]):.6g}; "
            "apply it to its own base model",
        )


def _recorded_context(source: Source | None) -> int | None:
    """Return L as recorded by the source; `ConfigError` for a path without CLEX."""
    if isinstance(source, FrequencyTable):
        return source.context_len
    if source is None or isinstance(source, Clex):
        return None
    directory = Path(source)
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).context_len
    if official.is_official(directory):
        return int(official.read_official_config(directory).max_position_embeddings)
    raise ConfigError(
        directory, None, "contains no CLEX (neither clex.json nor rope_scaling.type=clex); pass the final/ of a run"
    )


def _own_context(model: Any) -> int:
    own = context_in_config(model.config, "context_len")
    if own is None:
        raise ConfigError(
            "context_len",
            None,
            "the model's config has no max_position_embeddings; pass the context length it was trained on",
        )
    return own.length
