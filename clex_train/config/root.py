"""Config of a training run: all groups joined, and the checks between them.

Each group is a dataclass with a string under each field and its bounds in `__post_init__`. Hydra composes `conf/` into
these schemas, so that a misspelt key or a wrong type is refused on composing. Entry points call `to_config` once; from
there on the program uses plain dataclasses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from clex_train.config import duration
from clex_train.config.adapter import AdapterConfig
from clex_train.config.attention import AttentionConfig
from clex_train.config.checkpoint import CheckpointConfig
from clex_train.config.data import DataConfig, DomainConfig
from clex_train.config.docs import describe
from clex_train.config.engine import EngineConfig
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.launch import LaunchConfig
from clex_train.config.method import FORMULAS, Method
from clex_train.config.model import Init, ModelConfig
from clex_train.config.optim import OptimConfig
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.config.tracking import TrackingConfig
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import require_plain_name
from clex_train.utils.suggestions import did_you_mean


class Resume(Enum):
    """Choices of what to do with existing checkpoints."""

    auto = "auto"
    strict = "strict"
    never = "never"


@dataclass
class Config:
    """Everything that defines a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    name: str = "run"
    """Name of the run; set by experiments."""
    seed: int = 0
    """Seed of all randomness, which is a function of it, the stream and the step; 0 to 2**63 - 1."""
    resume: Resume = Resume.auto
    """`auto` resumes from the newest valid checkpoint of `output_dir`; `strict` only if no newer one is damaged;
    `never` refuses a folder with a checkpoint."""
    max_runtime: str | None = None
    """Stop early with a checkpoint and exit code 75, after hours or [days-]hours:minutes:seconds since the launch."""
    dry_run: bool = False
    """Print the plan (sizes, memory, tokens) and exit; needs no weights, GPU or data."""
    output_dir: str = "runs/${name}"
    """Run folder: config, metrics, checkpoints, final model, evaluation."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or a positive integer below 2**63")
        if self.max_runtime is not None:
            duration.seconds("max_runtime", self.max_runtime)


def register() -> None:
    """Store the schema in Hydra's ConfigStore under the name that `conf/config.yaml` lists first."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Convert the composed config to a checked `Config`; `ConfigError` names the key, the value and the remedy."""
    # Before to_object, which would set an unknown key as an attribute that nobody reads.
    _refuse_unknown(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _check_between_groups(config)
    return config


def _refuse_unknown(composed: DictConfig) -> None:
    """Refuse keys that Hydra lets past the schema."""
    # `+key=value` adds any key, and a value that nobody reads would look as if it had an effect.
    known = [key for key, *_ in describe(Config)]
    # resolve=False: an interpolation of an unknown key must not hide the key.
    for group, value in composed.items_ex(resolve=False):
        for key in [f"{group!s}.{name!s}" for name in value] if isinstance(value, DictConfig) else [str(group)]:
            if key not in known:
                raise ConfigError(key, None, f"no such key; {did_you_mean(key, known) or '--help lists them all'}")
    _refuse_unknown_domain_keys(composed)


def _refuse_unknown_domain_keys(composed: DictConfig) -> None:
    known = [key for key, *_ in describe(DomainConfig)]
    for name, domain in composed.data.domains.items_ex(resolve=False):
        for key in domain:
            if key not in known:
                raise ConfigError(
                    f"data.domains.{name}.{key}", None, f"no such key; a domain has {' and '.join(known)}"
                )


def _check_names(config: Config) -> None:
    """Refuse names that lead out of the intended folders."""
    # Not in __post_init__: recorded configs of earlier runs are read by the same schema and must stay readable.
    require_plain_name("name", config.name, "it names the run's folder by default")
    require(config.output_dir.strip() != "", "output_dir", repr(config.output_dir), "name the run's folder")


def _check_between_groups(config: Config) -> None:
    model, engine, optim = config.model, config.engine, config.optim
    _check_names(config)
    config.adapter.require_used()
    require(
        model.path is not None or model.config is not None,
        "model.path",
        model.path,
        "name a model directory or hub repository (or only model.config for random weights)",
    )
    # `is_dir` decides, as in from_pretrained: a local folder wins over a hub repository of the same name.
    is_local = model.path is None or Path(model.path).is_dir()
    # A revision of a local folder would be ignored silently.
    where = "there is no model.path" if model.path is None else f"{model.path} is a folder on this machine"
    require(
        model.revision is None or not is_local,
        "model.revision",
        model.revision,
        f"applies only to hub repositories, but {where}; leave the key out",
    )
    _check_data(config)
    require(
        model.init is not Init.pretrained or model.path is not None,
        "model.path",
        model.path,
        "model.init=pretrained needs weights: name a model directory or hub repository",
    )
    # Ranks are unknown here; they must divide the rest, which the loader checks.
    rows = (engine.micro_batch or 1) * (engine.accumulation or 1)
    require(
        optim.batch_rows % rows == 0,
        "optim.batch_rows",
        optim.batch_rows,
        f"must be a multiple of engine.micro_batch * engine.accumulation = {rows}",
    )


def _check_data(config: Config) -> None:
    data = config.data
    require(
        # A dry run plans without data.
        config.dry_run or data.path is not None or len(data.domains) > 0,
        "data.path",
        data.path,
        "name a token store; `python -m data_prep tokenize` writes one",
    )
    require(
        data.path is None or not data.domains,
        "data.path",
        data.path,
        f"one store or several: with data.domains ({', '.join(data.domains)}) set data.path=null",
    )
    for name, domain in data.domains.items():
        missing = not config.dry_run and domain.path is None
        require(not missing, f"data.domains.{name}.path", domain.path, "name the token store of this domain")
    require(
        config.dry_run or not data.domains or config.evaluation.path is not None or config.evaluation.every < 0,
        "evaluation.path",
        config.evaluation.path,
        "a mixture has no validation split of its own; name the store to evaluate on (or evaluation=never)",
    )


MULTIPLES = (1, 2, 4, 8, 16)
"""Multiples of L at which a model is evaluated by default."""


def with_lengths(config: Config, context_len: int, longest_document: int | None = None) -> Config:
    """Fill in the lengths that follow from the model, whose L is `context_len` tokens.

    `longest_document` is the longest held-out document in tokens; None if unknown.
    """
    data, evaluation, scaling = config.data, config.evaluation, config.scaling
    if not data.seq_len:
        data = replace(data, seq_len=context_len)
    if not evaluation.lengths:
        # Formulas have no t_max of their own to respect; longer windows then show how they degrade.
        t_max = scaling.t_max if scaling.name is Method.clex else None
        evaluation = replace(evaluation, lengths=default_lengths(context_len, t_max, longest_document))
    return replace(config, data=data, evaluation=evaluation)


def default_lengths(context_len: int, t_max: float | None, longest_document: int | None) -> list[int]:
    """Return `MULTIPLES` of L up to t_max and the longest document; None means no limit."""
    limits = (t_max or math.inf, (longest_document or math.inf) / context_len)
    # Documents shorter than L leave [L], and the evaluation then reports that nothing is long enough.
    return [multiple * context_len for multiple in MULTIPLES if multiple <= min(limits)] or [context_len]


def check_protocols(config: Config) -> None:
    """Raise `ConfigError` for a protocol without windows, which a run cannot evaluate."""
    require(
        Protocol.streaming not in config.evaluation.protocols,
        "evaluation.protocols",
        [protocol.value for protocol in config.evaluation.protocols],
        "streaming reads one long text, after the run: python -m clex_train.cli.evaluate run=... protocols=[streaming]",
    )


def check_reach(config: Config, context_len: int) -> None:
    """Raise `ConfigError` if an evaluation window is longer than the context that CLEX is trained to serve."""
    longest, scaling = config.evaluation.longest(), config.scaling
    # Whole tokens: a window one token beyond the trained range is already extrapolation.
    served = int(scaling.t_max * context_len)
    require(
        scaling.name is not Method.clex or config.evaluation.every < 0 or longest <= served,
        "evaluation.lengths",
        config.evaluation.lengths,
        f"beyond scaling.t_max * L = {scaling.t_max:g} * {context_len} = {served} tokens; raise scaling.t_max, or set "
        "evaluation.lengths=[] for lengths that follow from the model's L",
    )


def check_scaling(config: Config, holds_clex: bool) -> None:
    """Raise `ConfigError` if weights trained with CLEX would continue training without it."""
    require(
        config.scaling.name is Method.clex or not holds_clex,
        "scaling.name",
        config.scaling.name.name,
        f"{config.model.path} has a CLEX field, which scaling={config.scaling.name.name} would drop; set scaling=clex "
        "to continue training it",
    )


def check_lambda_mask(config: Config) -> None:
    """Raise `ConfigError` for settings that conflict with training under LM-Infinite's mask."""
    if not config.attention.lambda_mask:
        return
    scaling, evaluation = config.scaling, config.evaluation
    methods, protocols = ([item.value for item in items] for items in (evaluation.methods, evaluation.protocols))
    evaluates = evaluation.every >= 0
    # scaling=none ignores `positions`, whose default is mix.
    plain = scaling.name is Method.none or scaling.positions is Positions.plain
    # A table instead of nine calls: each line is one rule, with the reason that the user reads.
    conflicts: list[tuple[bool, str, object, str]] = [
        (
            config.data.document_mask,
            "data.document_mask",
            True,
            "the mask treats each row as one stream; set it to false",
        ),
        (
            not plain,
            "scaling.positions",
            scaling.positions.name,
            "sampled positions have no distance limit; use plain",
        ),
        (
            evaluates and Method.lm_infinite in evaluation.methods,
            "evaluation.methods",
            methods,
            "every method already uses the mask during training; leave lm_infinite out",
        ),
        (
            evaluates and Protocol.chunked in evaluation.protocols,
            "evaluation.protocols",
            protocols,
            "chunked changes t while keys are cached, which the mask cannot follow; use one_shot",
        ),
    ]
    for is_wrong, key, value, reason in conflicts:
        require(not is_wrong, key, value, f"attention=lambda: {reason}")


def check_positions(config: Config, context_len: int) -> None:
    """Raise `ConfigError` if rows do not fit into the positions of the scaling."""
    scaling, row_len = config.scaling, config.data.seq_len
    served = int(scaling.t_max * context_len)
    require(
        scaling.name is not Method.clex or row_len <= served,
        "data.seq_len",
        row_len,
        f"longer than the scaling.t_max * L = {scaling.t_max:g} * {context_len} = {served} tokens that CLEX serves; "
        "set data.seq_len=0 for the model's L",
    )
    require(
        # t is drawn from 1 on, and plain positions are not compressed into t * L.
        scaling.name is not Method.clex or scaling.positions is not Positions.plain or row_len <= context_len,
        "scaling.positions",
        scaling.positions.name,
        f"rows of {row_len} tokens would leave t * L, L = {context_len}, at a small t; use random, skip or mix",
    )
    factor = scaling.factor_for(row_len, context_len)
    require(
        # Rounded: factor = seq_len / L may miss the row by one unit in the last place.
        scaling.name not in FORMULAS or round(factor * context_len) >= row_len,
        "scaling.factor" if scaling.factor else "scaling.t_max",
        factor,
        f"{factor:g} * {context_len} tokens are fewer than those of a row, data.seq_len={row_len}; raise it",
    )
