"""Checks of a run with adapters, before weights are read: its model, and the options that they cannot go with."""

from transformers import PretrainedConfig

from clex_train.adapters import trained_set
from clex_train.adapters.trained_set import TrainedSet
from clex_train.config.root import Config
from clex_train.model_config.meta_models import model_on_meta
from clex_train.utils import distributed, log
from clex_train.utils.errors import ConfigError, require

logger = log.get(__name__)

MLP_NAMES = ("mlp", "feed_forward", "ffn")


def check_base(config: Config, arch: PretrainedConfig) -> None:
    """Raise `ConfigError` for adapters over a quantized base (QLoRA). Call it before the checks of its weights."""
    if not config.adapter.is_used or getattr(arch, "quantization_config", None) is None:
        return
    raise ConfigError(
        "adapter.name",
        config.adapter.name.value,
        f"the weights of model.path={config.model.path} are quantised (QLoRA), and the merged model in final/ would "
        "not be the one that was trained: the sum of packed weights and an adapter is rounded again, which loses part "
        "of a change as small as an adapter's; give the model that they were made from, in bfloat16: 7B parameters "
        "take 13 GiB, and dry_run=true shows the memory of the run",
    )


def check(config: Config, arch: PretrainedConfig) -> TrainedSet | None:
    """Choose what a run with adapters trains; None for a run that trains every weight.

    Raises:
        ConfigError: the model has no such layers, or an option needs the layers as they are.
    """
    adapter = config.adapter
    if not adapter.is_used:
        return None
    trained = trained_set.choose(model_on_meta(arch, config.model.trust_remote_code), adapter)
    in_mlps = any(f".{name}." in layer for layer in trained.adapted for name in MLP_NAMES)
    require(
        config.engine.tiled_mlp is None or adapter.dropout == 0 or not in_mlps,
        "adapter.dropout",
        adapter.dropout,
        "engine.tiled_mlp computes an adapted MLP twice, which would drop other inputs in each; set it to 0, or adapt "
        "the attention alone (adapter.targets=[attention])",
    )
    if not config.model.is_pretrained and distributed.is_main():
        logger.warning("adapter=%s: the weights below the adapters are random, and stay so", adapter.name.value)
    return trained
