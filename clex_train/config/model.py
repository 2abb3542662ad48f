"""Config group `model`: weights, architecture, tokenizer and the context of the base model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


class Init(Enum):
    """Sources of the initial weights."""

    pretrained = "pretrained"
    random = "random"


@dataclass
class ModelConfig:
    """The `model` group: weights, architecture, context length."""

    path: str | None = None
    """Directory or hub name of the weights, in Hugging Face layout, or the `final/` of an earlier run."""
    init: Init | None = None
    """`pretrained` loads the weights of `model.path`; `random` draws weights for `model.config` from the seed.
    null: `pretrained` with a `model.path`, else `random`."""
    config: str | None = None
    """Directory with a `config.json`: the architecture for random weights, and for a dry run on a machine without
    `model.path`. It has no effect if `model.path` is present."""
    allow_missing: list[str] = field(default_factory=list)
    """Patterns such as `["lm_head.*"]` of tensors that may differ between weights and architecture: missing ones are
    drawn from the seed, superfluous ones are dropped. Any other difference is an error that names the tensor."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; null: that of `model.path`, then that of the data store."""
    context_len: int | None = None
    """L, the context in tokens that the base model serves without extension. null: from the model (`clex.json` of a
    CLEX run, the length of a static scaling such as YaRN, else `max_position_embeddings`)."""
    trust_remote_code: bool = False
    """Allow Python code from `model.path` to run. Use it only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository; pin it to make runs reproducible."""

    PREFIX: ClassVar[str] = "model."
    """Prefix of these keys on the command line; evaluation programs use them without it."""

    def __post_init__(self) -> None:
        # PREFIX, not a constant: errors must name the key as the running program spells it.
        require_at_most(self, self.PREFIX, {"context_len": MOST_TOKENS})
        require(
            self.context_len is None or self.context_len >= 2,
            f"{self.PREFIX}context_len",
            self.context_len,
            "at least 2 tokens",
        )

    @property
    def is_pretrained(self) -> bool:
        """True if training starts from the weights of `path`."""
        # init=null with a path means pretrained, so that naming a model is enough.
        return self.init is Init.pretrained or (self.init is None and self.path is not None)
