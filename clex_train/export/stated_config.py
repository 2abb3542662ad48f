"""config.json of a model with a field at one t, log-scaling included."""

from dataclasses import replace

from transformers import PretrainedConfig

from clex_train.export import constant_scale
from clex_train.export.factors import Source, rope_at
from clex_train.export.stock_rope import head_dim, stock_config


def config_at(source: Source, t: float, trust_remote_code: bool) -> PretrainedConfig:
    """Return the config of a model with a field at `t`; no weights are read.

    Raises:
        InputError: no config.json expresses the model.
    """
    rope = rope_at(source, t)
    scaled = constant_scale.layers(source, source.longest_at(t), source.log_scale)
    magnitude = constant_scale.as_magnitude(source, scaled, rope.rotary_dim, head_dim(source.arch.get_text_config()))
    rope = replace(rope, attention_factor=rope.attention_factor * magnitude)
    return stock_config(source.arch, rope, trust_remote_code)
