"""Records of a model directory to export: architecture, L, field, table; its weights are not read."""

from dataclasses import replace
from pathlib import Path

from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.export.factors import Source
from clex_train.models import architecture, official
from clex_train.models import directory as model_directory
from clex_train.rope.native import NoRotaryHandle, native_handle_on_meta
from clex_train.scaling.frequency_table import scale_grid
from clex_train.utils.errors import ConfigError

MASKED = (
    "trained with LM-Infinite: no engine has its distance cap and its rolling window of latest tokens; clex_train "
    "alone serves it (docs/lm_infinite.md)"
)


def read_source(model: ModelConfig) -> Source:
    """Read the records of a model directory; `ConfigError` for one that is damaged, or has no RoPE."""
    arch, directory = architecture.to_read(model), Path(str(model.path))
    length = architecture.context_length(model, arch)
    handle = native_handle_on_meta(arch, length, model.trust_remote_code)
    if isinstance(handle, NoRotaryHandle):
        raise ConfigError(
            "model_type", handle.model_type, "no rotary position embedding, so there are no frequencies to export"
        )
    if model_directory.has_clex(directory):
        clex, table, record = model_directory.read_clex(directory)
        if record.lambda_mask:
            raise ConfigError("model", str(directory), MASKED)
        return Source(arch, handle, length, clex, table, LogScale(record.log_scale))
    if official.is_official(directory):
        field = official.read_official_field(directory, handle.base_inv_freq)
        # The original code stores no table. Its field is solved at the integers, as that code does.
        table = replace(field.clex.table(scale_grid(field.clex.t_max)), context_len=length)
        return Source(arch, handle, length, field.clex, table, LogScale(field.log_scale))
    return Source(arch, handle, length)
