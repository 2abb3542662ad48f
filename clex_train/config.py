"""The configuration of a training run: one dataclass per group, a string under each field, bounds checked on creation.

Hydra composes `conf/` into these schemas, so a misspelt key or a wrong type is refused while composing; `__post_init__`
refuses values out of range. Entry points call `to_config` once: from there on the program sees plain dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from clex_train.schema_docs import describe
from clex_train.suggest import did_you_mean


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


class ScalingName(Enum):
    none = "none"
    clex = "clex"


class Positions(Enum):
    random = "random"
    uniform = "uniform"
    skip = "skip"
    mix = "mix"


class Activation(Enum):
    silu = "silu"
    tanh = "tanh"


class LogScale(Enum):
    off = "off"
    eval = "eval"
    always = "always"
    official = "official"


class AttentionImplementation(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"


class Offload(Enum):
    none = "none"
    optimizer = "optimizer"
    all = "all"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Protocol(Enum):
    one_shot = "one_shot"
    chunked = "chunked"


class Method(Enum):
    trained = "trained"
    none = "none"
    pi = "pi"
    ntk = "ntk"


class Resume(Enum):
    auto = "auto"
    never = "never"


class Wandb(Enum):
    online = "online"
    offline = "offline"
    off = "off"


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ValueError` in the one form users see for a value that is out of range."""
    if not condition:
        raise ValueError(f"{key}={value}: {remedy}")


@dataclass
class ModelConfig:
    path: str | None = None
    """Directory or hub name to load weights from, in the Hugging Face layout, or the `final/` of an earlier run."""
    init: Init = Init.pretrained
    """`pretrained` loads the weights of `model.path`; `random` draws weights for `model.config` from the seed."""
    config: str | None = None
    """Directory with the architecture's `config.json`; enough for `dry_run` and for `model.init=random`."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; by default `model.path`, then the tokenizer of the data store."""
    context_len: int | None = None
    """L, the context in tokens that the base model was trained on; by default its `max_position_embeddings`."""
    trust_remote_code: bool = False
    """Allow Python code from `model.path` to run. Only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository; pin it for runs that must be repeatable."""

    def __post_init__(self) -> None:
        require(
            self.context_len is None or self.context_len >= 2,
            "model.context_len",
            self.context_len,
            "at least 2 tokens",
        )


@dataclass
class DataConfig:
    path: str | None = None
    """Directory of a tokenised store, as written by `python -m data_prep tokenize`."""
    seq_len: int = 4096
    """Tokens in a training row. Rows of any length are cut from one store without tokenising again."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2 tokens, one to read and one to predict")


@dataclass
class ScalingConfig:
    name: ScalingName = ScalingName.none
    """`none` trains with the model's own RoPE; `clex` learns the frequencies as an ODE over the scale factor."""
    t_max: float = 16.0
    """Largest scale factor: each optimizer step draws t ~ U[1, t_max]; contexts up to t_max * L are served."""
    positions: Positions = Positions.mix
    """Where a row's tokens sit in [0, t*L): `random` (the paper), `uniform`, `skip` (chunks with gaps) or `mix`."""
    mix_random: float = 0.25
    """Share of rows that `mix` gives `random` positions; the others take `skip`."""
    max_chunks: int = 8
    """`skip` cuts a row into between 2 and this many contiguous chunks."""
    param_factor: float = 1.0
    """Width of the vector field's hidden layer in units of the rotary dimension (lambda in the paper)."""
    act: Activation = Activation.silu
    """Activation of the vector field."""
    lr_scale: float = 0.05
    """Learning rate of the ODE's parameters over the model's; 0 freezes the field, leaving the NTK drift."""
    weight_decay: float = 0.0
    """Weight decay of the ODE's own AdamW."""
    clip: float = 1.0
    """Largest gradient norm of the ODE's parameters."""
    max_residual: float = 4.0
    """Guard: the run stops, naming t, when the learned part |log theta - log theta_ntk| grows beyond this."""
    tolerance: float = 1e-6
    """Largest error in log theta that the solver's grid may have, checked by step doubling."""
    check_every: int = 100
    """Optimizer steps between two checks of the solver's grid."""
    log_scale: LogScale = LogScale.off
    """Attention logits times log(n)/log(L) beyond L: in evaluation only, always, or the official code's variant."""
    official_ntk_base: bool = False
    """The vector field sees log theta_ntk at base 10000 whatever the model's base, as in the official code."""

    def __post_init__(self) -> None:
        require(self.t_max >= 1, "scaling.t_max", self.t_max, "a scale factor is at least 1")
        require(0 <= self.mix_random <= 1, "scaling.mix_random", self.mix_random, "a probability between 0 and 1")
        require(self.max_chunks >= 2, "scaling.max_chunks", self.max_chunks, "at least 2 chunks")
        require(self.param_factor > 0, "scaling.param_factor", self.param_factor, "greater than 0")
        require(self.lr_scale >= 0, "scaling.lr_scale", self.lr_scale, "0 or more")
        require(self.weight_decay >= 0, "scaling.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "scaling.clip", self.clip, "greater than 0")
        require(self.max_residual > 0, "scaling.max_residual", self.max_residual, "greater than 0")
        require(1e-12 <= self.tolerance <= 1e-2, "scaling.tolerance", self.tolerance, "between 1e-12 and 1e-2")
        require(self.check_every >= 1, "scaling.check_every", self.check_every, "at least 1 step")


@dataclass
class AttentionConfig:
    implementation: AttentionImplementation = AttentionImplementation.sdpa
    """Attention back end of transformers; `flash_attention_2` needs flash-attn and a GPU."""


@dataclass
class EngineConfig:
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    offload: Offload = Offload.none
    """Keep the optimizer's state, or `all` (optimizer and parameters), in host memory."""
    micro_batch: int | None = 1
    """Rows per rank in one forward and backward; null: as many as the rank has to read between two accumulations."""
    accumulation: int | None = None
    """Micro-batches per optimizer step; by default what optim.batch_rows, micro_batch and the ranks ask for."""
    precision: Precision = Precision.auto
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    timeout: float = 30.0
    """Minutes that a collective may wait for a rank before the run fails."""
    world_size: int | None = None
    """Ranks assumed by `dry_run`'s memory estimate; a real run takes what the launcher gives."""

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(self.micro_batch is None or self.micro_batch >= 1, "engine.micro_batch", self.micro_batch, "at least 1")
        require(
            self.accumulation is None or self.accumulation >= 1, "engine.accumulation", self.accumulation, "at least 1"
        )
        require(self.timeout > 0, "engine.timeout", self.timeout, "minutes, greater than 0")
        require(
            self.world_size is None or self.world_size >= 1, "engine.world_size", self.world_size, "at least 1 rank"
        )
        require(
            self.offload is Offload.none or self.zero_stage >= 1,
            "engine.offload",
            self.offload.name,
            "needs engine.zero_stage 1 or higher",
        )
        require(
            self.offload is not Offload.all or self.zero_stage == 3,
            "engine.offload",
            self.offload.name,
            "offloading parameters needs engine.zero_stage=3",
        )


@dataclass
class OptimConfig:
    lr: float = 2e-5
    """Peak learning rate of the model's AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest global gradient norm."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_rows: int = 512
    """Rows per optimizer step over all ranks; the run is the same however many ranks share them."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Schedule = Schedule.cosine
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the run as a multiple of the peak."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite, and which are skipped, before the run stops."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "greater than 0")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two of [0, 1)"
        )
        require(self.eps > 0, "optim.eps", self.eps, "greater than 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip > 0, "optim.clip", self.clip, "greater than 0")
        require(self.steps >= 1, "optim.steps", self.steps, "at least 1 step")
        require(self.batch_rows >= 1, "optim.batch_rows", self.batch_rows, "at least 1 row")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "a share of the steps in [0, 1)")
        require(self.max_bad_steps >= 1, "optim.max_bad_steps", self.max_bad_steps, "at least 1 step")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "between 0 and 1")


@dataclass
class EvaluationConfig:
    every: int = 0
    """Optimizer steps between evaluations during training; 0 evaluates only at the end, -1 never."""
    lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384, 32768, 65536])
    """Window lengths in tokens. The same tokens are scored at every length."""
    protocols: list[Protocol] = field(default_factory=lambda: [Protocol.one_shot])
    """`one_shot`: t fixed by the window's length; `chunked` (official): chunks of L through the cache, t grows."""
    methods: list[Method] = field(default_factory=lambda: [Method.trained])
    """`trained` is the model as trained; `none`, `pi`, `ntk` put those frequencies into the same weights."""
    path: str | None = None
    """Token store whose validation split is read; by default that of `data.path`."""
    num_windows: int = 32
    """Windows of the largest length that are scored (fewer if the split has fewer)."""
    chunk_len: int = 1024
    """Tokens per forward inside a `one_shot` window: bounds the memory of logits, not the result."""

    def __post_init__(self) -> None:
        require(self.every >= -1, "evaluation.every", self.every, "-1 (never), 0 (at the end) or a number of steps")
        require(
            len(self.lengths) > 0 and all(n >= 2 for n in self.lengths),
            "evaluation.lengths",
            self.lengths,
            "one or more lengths of at least 2 tokens",
        )
        shortest, longest = min(self.lengths), max(self.lengths)
        require(
            all(longest % n == 0 and n % shortest == 0 for n in self.lengths),
            "evaluation.lengths",
            self.lengths,
            "each must be a multiple of the shortest and divide the longest, so that all score the same tokens",
        )
        require(len(self.methods) > 0, "evaluation.methods", self.methods, "one or more methods")
        require(len(self.protocols) > 0, "evaluation.protocols", self.protocols, "one or more protocols")
        require(self.num_windows >= 1, "evaluation.num_windows", self.num_windows, "at least 1 window")
        require(self.chunk_len >= 1, "evaluation.chunk_len", self.chunk_len, "at least 1 token")


@dataclass
class CheckpointConfig:
    every: int = 0
    """Optimizer steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Newest complete checkpoints that are kept."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 or a number of steps")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "at least 1")


@dataclass
class TrackingConfig:
    wandb: Wandb = Wandb.offline
    """`online` needs a login, `offline` writes files to sync later, `off` leaves wandb alone."""
    project: str = "clex-train"
    """Name of the wandb project."""
    log_every: int = 1
    """Optimizer steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "tracking.log_every", self.log_every, "at least 1 step")


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str = "run"
    """Name of the run; experiments set it to their own."""
    seed: int = 0
    """All randomness is a function of this, the stream and the step."""
    resume: Resume = Resume.auto
    """`auto` continues the newest complete checkpoint of `output_dir`; `never` refuses a folder that has one."""
    dry_run: bool = False
    """Print the plan (sizes, memory, tokens) and exit: no weights, no GPU, no data needed."""
    output_dir: str = "runs/${name}"
    """Run folder: config, metrics, checkpoints, final model, evaluation."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or a positive integer")


def register() -> None:
    """Put the schema into Hydra's ConfigStore under the name that `conf/config.yaml` lists first."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`; `ValueError` names the key, the value and the remedy."""
    _refuse_unknown(composed)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _check_between_groups(config)
    return config


def _refuse_unknown(composed: DictConfig) -> None:
    """Hydra lets `+key=value` past a schema; a field that nobody reads is a mistake all the same."""
    known = [key for key, *_ in describe(Config)]
    for group, value in composed.items_ex(resolve=False):
        for key in [f"{group!s}.{name!s}" for name in value] if isinstance(value, DictConfig) else [str(group)]:
            if key not in known:
                raise ValueError(f"{key}: no such key; {did_you_mean(key, known) or '--help lists them all'}")


def _check_between_groups(config: Config) -> None:
    model, engine, optim = config.model, config.engine, config.optim
    require(
        model.path is not None or model.config is not None,
        "model.path",
        model.path,
        "name a model directory or hub repository (or model.config with model.init=random)",
    )
    require(
        model.init is Init.pretrained or model.config is not None,
        "model.config",
        model.config,
        "model.init=random needs the directory of an architecture",
    )
    require(
        config.dry_run or config.data.path is not None,
        "data.path",
        config.data.path,
        "name a token store; `python -m data_prep tokenize` writes one",
    )
    require(
        config.dry_run or model.init is Init.random or model.path is not None,
        "model.path",
        model.path,
        "model.init=pretrained needs weights: name a model directory or hub repository",
    )
    rows = (engine.micro_batch or 1) * (engine.accumulation or 1)
    require(
        optim.batch_rows % rows == 0,
        "optim.batch_rows",
        optim.batch_rows,
        f"must be a multiple of engine.micro_batch * engine.accumulation = {rows}",
    )


def check_reach(config: Config, context_len: int) -> None:
    """`ValueError` when a window to be evaluated is longer than the context that CLEX is trained to serve."""
    longest, scaling = max(config.evaluation.lengths), config.scaling
    require(
        scaling.name is not ScalingName.clex or config.evaluation.every < 0 or longest <= scaling.t_max * context_len,
        "scaling.t_max",
        scaling.t_max,
        f"serves {scaling.t_max:g} * {context_len} tokens, evaluation.lengths asks for {longest}; raise one or shorten",
    )


def check_scaling(config: Config, holds_clex: bool) -> None:
    """`ValueError` when weights that were trained with CLEX are to be trained on without it."""
    require(
        config.scaling.name is ScalingName.clex or not holds_clex,
        "scaling.name",
        config.scaling.name.name,
        f"{config.model.path} holds a CLEX field, which plain RoPE would drop; scaling=clex trains it on",
    )
