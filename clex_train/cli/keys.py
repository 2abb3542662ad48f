"""Arguments that the programs of evaluation share: the model to load, and the scaling methods to compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clex_train.config.attention import AttentionImplementation
from clex_train.config.engine import Precision
from clex_train.config.method import Method

METHOD_KEYS = (
    "methods",
    "rope_theta",
    "dynamic_factor",
    "longrope_factors",
    "method_options",
    "t_factor",
    "n_local",
    "n_global",
    "lm_infinite_t",
    "lm_infinite_top_k",
    "lm_infinite_top_k_layer",
)


@dataclass
class LoadingConfig:
    """Arguments of every program that loads a trained model."""

    run: str | None = None
    """Folder of a finished run: its `final/` is evaluated, by default on its own validation data and lengths. A folder
    may stand without a key."""
    model: str | None = None
    """Model directory or hub name instead of a run."""
    context_len: int | None = None
    """L, the length that the base model was trained on; by default what the model says."""
    allow_missing: list[str] = field(default_factory=list)
    """Patterns such as `["lm_head.*"]` of tensors that weights and architecture need not share. Any other is refused by
    name."""
    precision: Precision = Precision.auto
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    attention: AttentionImplementation = AttentionImplementation.sdpa
    """Attention back end of transformers; `flash_attention_2` needs flash-attn and a GPU. `sdpa`, also by `auto`, is
    `eager` for a model without."""
    sharded: bool = False
    """Split the weights over the ranks (ZeRO-3) instead of a copy on each: for a model that one GPU does not hold."""
    offload_parameters: bool = False
    """With `sharded`: the weights stay in host memory and visit the GPU layer by layer."""
    trust_remote_code: bool = False
    """Allow Python code from `model` to run. Only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository."""
    label: str | None = None
    """Name in tables and of the file; by default the folder's name, for the `final/` of a run the run's."""
    output: str | None = None
    """JSON file to write; by default `evaluation/<label>.json` in the run folder, or in `runs/<label>`. A file
    that is named here is replaced."""

    dry_run: bool = False
    """Only say what it takes: cells, forwards, tokens, memory, and a time from one timed chunk. Reads the weights for
    that; evaluates nothing and writes no file."""

    @property
    def path(self) -> str:
        """The model directory or hub name."""
        return str(Path(self.run) / "final") if self.run else str(self.model)


@dataclass
class MethodConfig(LoadingConfig):
    """Arguments of every program that compares scaling methods."""

    methods: list[Method] | None = field(default=None, metadata={"choices": Method})
    """`trained`: the model as it is; `clex`: the same, of a model with CLEX; `lm_infinite`: plain frequencies and the
    Lambda-shaped mask; the others: their frequencies on its weights. By default the run's, or as the model is."""
    rope_theta: float | None = None
    """Base of `theta`; by default 1e6."""
    dynamic_factor: float | None = None
    """Factor of `dynamic_ntk`; by default t. 1 is the dynamic NTK of the YaRN paper, 2 is `ntk`."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` and `long_factor`, for `longrope` on a model without."""
    method_options: dict[str, dict[str, Any]] | None = None
    """Other settings of methods, as `method_options.METHOD.NAME=value`."""
    n_local: int | None = None
    """Latest tokens that `lm_infinite` sees; by default t * L."""
    n_global: int | None = None
    """First tokens that `lm_infinite` sees; by default 10."""
    lm_infinite_t: float | None = None
    """t of the model's own table, which `lm_infinite` keeps at every length; by default 1, plain frequencies."""
    lm_infinite_top_k: int | None = None
    """Best keys between the first and the latest tokens that each query of `lm_infinite` also sees; by default 0. The
    paper's option has 5."""
    lm_infinite_top_k_layer: int | None = None
    """First layer that sees them; by default 5."""
    t_factor: float | None = None
    """`trained` and `clex` take the t of a text this many times as long, up to t_max; by default as it was made."""


def given(asked: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys that the command line says, with their values."""
    return {key: value for key in keys if (value := getattr(asked, key)) is not None}
