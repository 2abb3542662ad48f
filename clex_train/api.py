"""CLEX on a transformers causal LM of your own, in one call and undone in another.

    clex = apply_clex(model, "runs/llama2_7b_clex/final")    the field that a run has trained
    model.generate(**inputs)                                  t = least upper bound of n / L, cached keys follow
    with clex.pinned(8): model.generate(**inputs)             t stands still
    clex.undo()                                               the model as it was, to the bit

docs/library.md has the whole story; `rope.patch` does the work.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.attention.log_scaling import LogScaling, install_log_scaling
from clex_train.models import directory as model_directory
from clex_train.models import official
from clex_train.rope import recipes
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.table import FrequencyTable, scale_grid

Source = str | Path | Clex | FrequencyTable
T_MAX = 16.0


@dataclass
class AppliedClex:
    """CLEX in place on one model; made by `apply_clex`."""

    handle: RotaryHandle
    """What governs the frequencies, for more than the methods here (`rope.patch`)."""
    table: FrequencyTable
    """theta(t) on the grid that `t` moves on."""
    field: Clex | None
    """The ODE behind the table, for training; None when a bare table was given."""
    log_scaling: LogScaling
    clamp: bool = False

    def pinned(self, t: float) -> AbstractContextManager[None]:
        """`with`: every call inside uses theta(t), whatever its length; `ValueError` for a t off the table's grid."""
        return self.handle.pinned(t)

    def fixed(self, num_tokens: int) -> AbstractContextManager[None]:
        """`with`: every call inside uses the t and the log-scaling of one of `num_tokens` tokens."""
        return self.handle.fixed(num_tokens)

    def refresh(self) -> None:
        """Solve for the table anew, after the field was trained; `UnstableField` when it cannot be used."""
        assert self.field is not None, "a bare table has no field to solve"
        self.table = replace(_solve_table(self.field, self.handle.context_len), t_factor=self.table.t_factor)
        self.handle.use(self.table, self.clamp)

    def undo(self) -> None:
        """Give the model back as it was, to the bit."""
        self.log_scaling.undo()
        self.handle.undo()


def apply_clex(
    model: nn.Module,
    source: Source | None = None,
    *,
    context_len: int | None = None,
    t_max: float = T_MAX,
    log_scale: str | None = None,
    clamp: bool = False,
) -> AppliedClex:
    """Let the RoPE of `model` follow the length of each call, up to t_max * L tokens; weights stay as they are.

    `source` says which frequencies: a directory with a CLEX field (the `final/` of a run, or a checkpoint of the
    original code), a `Clex`, a `FrequencyTable`, or None for an untrained field: NTK scaling with alpha = 2t - 1 up to
    `t_max`. `context_len` is L in tokens, the context that the base was trained on: by default what the source says,
    else the model's `max_position_embeddings`. `log_scale` is a policy of `attention.log_scaling`; by default the
    source's, else `off`. With `clamp` a call beyond t_max * L is served at t_max with a warning instead of refused.

    `ValueError` in one line, and the model untouched: no RoPE or one that cannot be scaled, frequencies that do not fit
    the model (both are named), a damaged source, a model that is patched already.
    """
    length = context_len or _recorded_context(source) or _own_context(model)
    handle = install_rotary(model, length)
    try:
        handle.require_scalable()
        field, table, policy = _read(source, handle, t_max)
        handle.use(table, clamp)
        scaling = install_log_scaling(model, log_scale or policy, length, handle.on_length)
    except Exception:
        handle.undo()
        raise
    return AppliedClex(handle, table, field, scaling, clamp)


def _read(source: Source | None, handle: RotaryHandle, t_max: float) -> tuple[Clex | None, FrequencyTable, str]:
    """Field, table and log-scaling policy of a source that fits the model."""
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
        field, policy = stored.clex, stored.log_scale
    _require_same_base(field.base_inv_freq, base, source)
    return field, table or _solve_table(field, handle.context_len), policy


def _solve_table(field: Clex, context_len: int) -> FrequencyTable:
    """theta(t) on the integers up to t_max, within the field's tolerance."""
    return replace(field.table(scale_grid(field.t_max)), context_len=context_len)


def _require_same_base(found: Tensor, own: Tensor, source: Any) -> None:
    """A field continues the frequencies it was trained on; on others it would compute something else."""
    name = source if isinstance(source, str | Path) else "the field"
    if len(found) != len(own):
        raise ValueError(
            f"{name}: rotary dimension {2 * len(found)}, and the model's is {2 * len(own)}; "
            "apply it to its own base model"
        )
    if not torch.allclose(found.cpu(), own, rtol=1e-4, atol=0):
        j = int(((found.cpu() - own).abs() / own).argmax())
        raise ValueError(
            f"{name}: starts from theta[{j}]={float(found[j]):.6g}, and the model's is {float(own[j]):.6g}; "
            "apply it to its own base model"
        )


def _recorded_context(source: Source | None) -> int | None:
    """L as the source says it; `ValueError` for a path that holds no CLEX."""
    if isinstance(source, FrequencyTable):
        return source.context_len
    if source is None or isinstance(source, Clex):
        return None
    directory = Path(source)
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).context_len
    if official.is_official(directory):
        return int(official.read_official_config(directory).max_position_embeddings)
    raise ValueError(
        f"{directory}: no CLEX in it (neither clex.json nor rope_scaling.type=clex); give the final/ of a run"
    )


def _own_context(model: Any) -> int:
    own = recipes.own_context(model.config, "context_len")
    if own is None:
        raise ValueError("context_len: the model's config has no max_position_embeddings; say what it was trained on")
    return own.length
