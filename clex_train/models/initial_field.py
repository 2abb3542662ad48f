"""Initial vector field of a CLEX run: from an earlier run, from an official checkpoint, or a new one."""

from pathlib import Path

from clex_train.config.root import Config
from clex_train.config.scaling import LogScale, ScalingConfig
from clex_train.models import directory as model_directory
from clex_train.models import official
from clex_train.scaling.clex import Clex
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.new_field import new_field
from clex_train.utils import log
from clex_train.utils.errors import require

logger = log.get(__name__)


def starting_field(config: Config, rope: Rope) -> tuple[Clex, LogScale]:
    """Load the field of `model.path`, or create one from the base's `rope`; also return the run's log-scaling.

    Raises `ConfigError` when a key of `scaling` contradicts the existing field.
    """
    scaling, directory = config.scaling, Path(str(config.model.path))
    has_weights = config.model.is_pretrained
    # Without pretrained weights, the directory only lends its architecture, and its field belongs to other weights.
    if has_weights and model_directory.has_clex(directory):
        clex, _, _ = model_directory.read_clex(directory)
        return _continued(clex, scaling, directory), scaling.log_scale
    if has_weights and official.is_official(directory):
        field = official.read_official_field(directory, rope.inv_freq, scaling.tolerance)
        return _continued(field.clex, scaling, directory), _official_log_scale(field.log_scale, scaling, directory)
    return new_field(scaling, rope, config.seed), scaling.log_scale


def _continued(clex: Clex, scaling: ScalingConfig, directory: Path) -> Clex:
    """Check a trained field against the configuration, and extend or limit it to this run's t_max."""
    factor = clex.up.shape[1] / (2 * clex.up.shape[0])
    own = f"{directory} has {clex.kind}; set scaling.field={clex.kind} scaling.drift={clex.drift_name}"
    require(clex.kind == scaling.field.value, "scaling.field", scaling.field.name, own)
    own = f"{directory} has {clex.drift_name}; set scaling.drift={clex.drift_name}"
    require(clex.drift_name == scaling.drift.value, "scaling.drift", scaling.drift.name, own)
    require(clex.act == scaling.act.value, "scaling.act", scaling.act.name, f"{directory} has {clex.act}; set that")
    require(
        round(scaling.param_factor * 2 * len(clex.base_inv_freq)) == clex.up.shape[1],
        "scaling.param_factor",
        scaling.param_factor,
        f"{directory} has {factor:g}; set that",
    )
    # The quirk is part of the trained function. By default the key is off, which may also mean "not set", so only
    # an explicit contradiction is an error.
    require(
        clex.official_ntk_base or not scaling.official_ntk_base,
        "scaling.official_ntk_base",
        scaling.official_ntk_base,
        f"the field of {directory} was trained without it; leave the key out",
    )
    if clex.t_max != scaling.t_max:
        logger.info("scaling.t_max=%g: the field of %s was trained up to %g", scaling.t_max, directory, clex.t_max)
    # The field is defined for all t >= 1; t_max only bounds where it is trained and read.
    clex.t_max, clex.tolerance = float(scaling.t_max), scaling.tolerance
    logger.info("continuing the vector field of %s (official_ntk_base=%s)", directory, clex.official_ntk_base)
    return clex


def _official_log_scale(policy: str, scaling: ScalingConfig, directory: Path) -> LogScale:
    """Return the log-scaling of a run on an official checkpoint. Raises `ConfigError` for another than its own."""
    # Weights trained without log-scaling can adopt one; weights trained with it depend on it.
    if policy == "off":
        return scaling.log_scale
    require(
        scaling.log_scale in (LogScale.off, LogScale(policy)),
        "scaling.log_scale",
        scaling.log_scale.name,
        f"{directory} was made for scaling.log_scale={policy}; leave the key out",
    )
    return LogScale(policy)
