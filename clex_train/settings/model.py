"""Which model: weights, architecture, tokenizer and the context it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clex_train.settings.bounds import require


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


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
