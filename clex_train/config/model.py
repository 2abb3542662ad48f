"""Which model: weights, architecture, tokenizer and the context it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from clex_train.utils.bounds import MOST_TOKENS, require, require_at_most


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


@dataclass
class ModelConfig:
    path: str | None = None
    """Directory or hub name to load weights from, in the Hugging Face layout, or the `final/` of an earlier run."""
    init: Init | None = None
    """`pretrained` loads the weights of `model.path`; `random` draws weights for `model.config` from the seed. By
    default `pretrained` if there is a `model.path`, else `random`."""
    config: str | None = None
    """Directory with an architecture's `config.json`: what random weights are drawn for, and what a dry run reads where
    `model.path` is not on this machine. Beside a `model.path` that is, it has no effect."""
    allow_missing: list[str] = field(default_factory=list)
    """Patterns such as `["lm_head.*"]` of tensors that weights and architecture need not share: those that the weights
    lack are drawn from the seed, those that the architecture lacks are left out. Any other is refused by name."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer; by default `model.path`, then the tokenizer of the data store."""
    context_len: int | None = None
    """L, the context in tokens that the base model serves by itself. By default what the model says: `clex.json` of a
    CLEX run, the length of a static scaling such as YaRN, else `max_position_embeddings`."""
    trust_remote_code: bool = False
    """Allow Python code from `model.path` to run. Only for repositories you have read."""
    revision: str | None = None
    """Commit, tag or branch of a hub repository; pin it for runs that must be repeatable."""

    PREFIX: ClassVar[str] = "model."
    """Before the names of these keys on a command line; programs that evaluate have them without."""

    def __post_init__(self) -> None:
        require_at_most(self, self.PREFIX, {"context_len": MOST_TOKENS})
        require(
            self.context_len is None or self.context_len >= 2,
            f"{self.PREFIX}context_len",
            self.context_len,
            "at least 2 tokens",
        )

    @property
    def is_pretrained(self) -> bool:
        """Return True if training starts from the weights of `path`."""
        return self.init is Init.pretrained or (self.init is None and self.path is not None)
