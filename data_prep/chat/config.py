"""Config of `python -m data_prep chat` and `show`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most
from data_prep.config import MOST_MB, MOST_WORKERS, CorpusConfig


class Layout(Enum):
    """Layouts of a record."""

    messages = "messages"
    prompt_completion = "prompt_completion"
    sharegpt = "sharegpt"


class Scored(Enum):
    """Tokens of a conversation that the loss counts."""

    assistant = "assistant"
    last = "last"
    all = "all"


class Color(Enum):
    """Choices of marking scored tokens with terminal colours."""

    auto = "auto"
    always = "always"
    never = "never"


@dataclass
class ChatTokenizer:
    path: str | None = None
    """Directory or hub name of the model's tokenizer, whose chat template is used; short form: `tokenizer=PATH`."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the tokenizer to run. Use it only for repositories you have read."""


@dataclass
class ChatVerb:
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    """Conversations to read: files (`corpus.paths`) or a hub data set. `text_field` is not used, `field` is."""
    layout: Layout = Layout.messages
    """`messages`: a list of {role, content}; `prompt_completion`: two texts, or two such lists; `sharegpt`: a list of
    {from, value}."""
    field: str | None = None
    """Field of the conversation; null: `messages`, `prompt` or `conversations`, by the layout."""
    tokenizer: ChatTokenizer = dataclasses.field(default_factory=ChatTokenizer)
    """Tokenizer of the model."""
    template: str | None = None
    """Jinja file of a chat template to use instead of the tokenizer's own; the store and `final/` keep it."""
    scored: Scored = Scored.assistant
    """Tokens that the loss counts: of all turns of the `assistant`, of its `last` turn, or `all` tokens."""
    max_tokens: int | None = None
    """Tokens of a conversation at most, the end of the document included; longer ones are cut. null: no limit."""
    output: str = "corpora/${corpus.name}"
    """Directory of the token store to write."""
    workers: int = 1
    """Processes, each writing whole shards; the store does not depend on the number."""
    shard_mb: int = 256
    """Megabytes of source per shard."""
    overwrite: bool = False
    """Replace an existing or half-written store that was made with other settings."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"workers": MOST_WORKERS, "shard_mb": MOST_MB, "max_tokens": MOST_TOKENS})
        require(self.workers >= 1, "workers", self.workers, "at least 1 process")
        require(self.shard_mb >= 1, "shard_mb", self.shard_mb, "at least 1 megabyte")
        # One token to read and one to predict.
        require(self.max_tokens is None or self.max_tokens >= 2, "max_tokens", self.max_tokens, "at least 2 tokens")

    @property
    def field_name(self) -> str:
        """Field of a record that holds the conversation, or its prompt."""
        defaults = {
            Layout.messages: "messages",
            Layout.prompt_completion: "prompt",
            Layout.sharegpt: "conversations",
        }
        return self.field or defaults[self.layout]


@dataclass
class ShowVerb:
    store: str | None = None
    """Directory of a token store."""
    split: str = "train"
    """`train` or `validation`."""
    count: int = 3
    """Conversations to print, a fixed random sample."""
    color: Color = Color.auto
    """Mark scored tokens in colour: `auto` on a terminal, elsewhere by brackets."""

    def __post_init__(self) -> None:
        require_at_most(self, "", {"count": 10**6})
        require(self.count >= 1, "count", self.count, "at least 1 conversation")
        require(self.split in ("train", "validation"), "split", self.split, "train or validation")
