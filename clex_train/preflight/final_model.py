"""Warn before training of a `final/` that other programs will refuse.

Whether a config.json can express a model follows from its architecture and from `scaling.log_scale`, not from what the
field learns. So the code that writes `final/` is tried on the architecture with an untrained field.
"""

from transformers import PretrainedConfig

from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale
from clex_train.export.factors import Source
from clex_train.export.stated_config import config_at
from clex_train.model_config.meta_models import model_on_meta
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from clex_train.scaling.new_field import new_field
from clex_train.utils import distributed, log
from clex_train.utils.errors import InputError, first_line

logger = log.get(__name__)


def warn_if_unreadable(config: Config, arch: PretrainedConfig, context_len: int) -> None:
    """Log a warning, with the remedy if there is one, if no config.json expresses the model that a run trains.

    `context_len` is L in tokens.
    """
    if config.scaling.name is not Method.clex or not distributed.is_main():
        return
    policy = config.scaling.log_scale
    reason = _refusal(config, arch, context_len, policy)
    if reason is None:
        return
    remedy = "evaluate and serve it with clex_train"
    if policy is not LogScale.off and _refusal(config, arch, context_len, LogScale.off) is None:
        export = f"export run={config.output_dir} format=huggingface t={config.scaling.t_max:g} output=DIR"
        folding = (
            "export it after training, which folds the scale of one length into the weights (python -m "
            f"clex_train.cli.{export}), or "
        )
        # Nothing folds a scale into the queries of latent attention, nor one for each position into any.
        unfolded = hasattr(arch.get_text_config(), "qk_rope_head_dim") or policy.counts_each_token
        remedy = f"{'' if unfolded else folding}set scaling.log_scale=off"
    logger.warning(
        "final/ of this run will load in clex_train alone, other programs will refuse it (%s); %s", reason, remedy
    )


def _refusal(config: Config, arch: PretrainedConfig, context_len: int, policy: LogScale) -> str | None:
    """Return the reason why `final/` would state no t; None if it would."""
    if config.attention.lambda_mask:
        return "no other program has LM-Infinite's mask"
    scaling, remote = config.scaling, config.model.trust_remote_code
    handle = install_rotary(model_on_meta(arch, remote), context_len)
    try:
        clex = new_field(scaling, base_rope(handle))
        table = clex.table(sorted({1.0, scaling.t_max}))
        t = scaling.final_t or scaling.t_max
        config_at(Source(arch, handle, context_len, clex, table, policy), t, remote)
    except InputError as refusal:
        return first_line(refusal)
    finally:
        # The model is shared with the other checks.
        handle.undo()
    return None
