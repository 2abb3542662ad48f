"""Arguments that several programs share: the model to load, and keys of the scaling methods to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from clex_train.attention.select import check_attention
from clex_train.config.attention import AttentionImplementation
from clex_train.config.docs import DOCS, field_docs
from clex_train.config.engine import Precision
from clex_train.config.model import ModelConfig
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most

T = TypeVar("T")

METHOD_KEYS = (
    "methods",
    "rope_theta",
    "dynamic_factor",
    "longrope_factors",
    "method_options",
    "t_factor",
    "log_scale",
    "n_local",
    "n_global",
    "lm_infinite_t",
    "lm_infinite_top_k",
    "lm_infinite_top_k_layer",
)
"""Keys of the `evaluation` group for scaling methods, which these programs take without the group's name."""


@dataclass
class NamedModel(ModelConfig):
    """A model whose keys have no group on the command line."""

    PREFIX: ClassVar[str] = ""


@dataclass
class ModelArguments:
    """Arguments of every program that loads a trained model."""

    run: str | None = None
    """Folder of a finished run: its `final/` is read, by default with the settings of its own evaluations. A folder may
    be given without a key."""
    model: str | None = None
    """Model directory or hub name instead of a run."""
    context_len: int | None = None
    """L, the length that the base model was trained on; by default from the model's config."""
    allow_missing: list[str] = field(default_factory=list)
    """Patterns such as `["lm_head.*"]` of tensors that weights and architecture need not share. Any other is refused by
    name."""
    precision: Precision = Precision.auto
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    attention: AttentionImplementation = AttentionImplementation.sdpa
    """Attention back end of transformers; `flash_attention_2` needs flash-attn and a GPU. `sdpa`, also by `auto`, is
    `eager` for a model without."""
    trust_remote_code: bool = False
    """Allow Python code from `model` to run. Only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository."""

    @property
    def path(self) -> str:
        """The model directory or hub name."""
        return str(Path(self.run) / "final") if self.run else str(self.model)

    def given(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return those of `keys` that the command line sets, with their values."""
        return {key: value for key in keys if (value := getattr(self, key)) is not None}

    def named_model(self) -> NamedModel:
        """Return the `model` group that these arguments describe."""
        return NamedModel(
            path=self.path,
            context_len=self.context_len,
            allow_missing=self.allow_missing,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
        )


@dataclass
class LoadingConfig(ModelArguments):
    """Arguments of every program that evaluates a trained model."""

    sharded: bool = False
    """Split the weights over the ranks (ZeRO-3) instead of a copy on each: for a model that does not fit on one GPU."""
    offload_parameters: bool = False
    """With `sharded`: keep the weights in host memory and copy them to the GPU layer by layer."""
    label: str | None = None
    """Name in tables and of the file; by default the folder's name, for the `final/` of a run that of the run."""
    output: str | None = None
    """JSON file to write; by default `evaluation/<label>.json` in the run folder, or in `runs/<label>`. A file
    that is named here is replaced."""

    dry_run: bool = False
    """Only estimate the cost: cells, forwards, tokens, memory, and a time from one timed chunk. Reads the weights for
    that; evaluates nothing and writes no file."""


def check_model(args: ModelArguments) -> None:
    """Raise `ConfigError` for keys of the model that contradict each other or this machine."""
    require((args.run is None) != (args.model is None), "run", args.run, "name either run=FOLDER or model=DIR")
    # A revision of a local folder would be recorded without any effect.
    local = args.run or (args.model if args.model and Path(args.model).is_dir() else None)
    remedy = f"is of a hub repository, and {local} is a folder on this machine; leave the key out"
    require(args.revision is None or local is None, "revision", args.revision, remedy)
    require_at_most(args, "", {"context_len": MOST_TOKENS})
    require(args.context_len is None or args.context_len >= 2, "context_len", args.context_len, "at least 2 tokens")
    check_attention(args.attention, "attention")


def with_overrides(base: type[T], group: type, keys: Sequence[str], otherwise: str = "") -> type[T]:
    """Add keys of a config group to the dataclass `base`, each None unless the command line sets it.

    `otherwise` is appended to each description: the meaning of None.
    """
    docs, items = field_docs(group), {item.name: item for item in fields(group)}
    optional = [
        (
            key,
            f"{str(items[key].type).removesuffix(' | None')} | None",
            field(default=None, metadata=items[key].metadata),
        )
        for key in keys
    ]
    # Annotations are strings, which type hints look up in the module of the class.
    namespace = {"__module__": group.__module__, DOCS: {key: f"{docs[key]} {otherwise}" for key in keys}}
    return make_dataclass(f"{base.__name__}With{group.__name__}", optional, bases=(base,), namespace=namespace)
