"""What is evaluated, when and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clex_train.config import retrieval
from clex_train.config.bos import Bos
from clex_train.config.method import Method
from clex_train.config.retrieval import Task
from clex_train.utils.bounds import MOST_ROPE_THETA, MOST_SCALE, MOST_STEPS, MOST_TOKENS, require, require_at_most


class Protocol(Enum):
    one_shot = "one_shot"
    chunked = "chunked"
    sliding = "sliding"
    per_position = "per_position"
    last_k = "last_k"
    streaming = "streaming"


MOST = {
    "every": MOST_STEPS,
    "lengths": MOST_TOKENS,
    "rope_theta": MOST_ROPE_THETA,
    "dynamic_factor": MOST_SCALE,
    "n_local": MOST_TOKENS,
    "n_global": MOST_TOKENS,
    "lm_infinite_t": MOST_SCALE,
    "lm_infinite_top_k": MOST_TOKENS,
    "lm_infinite_top_k_layer": 10**4,
    "t_factor": MOST_SCALE,
    "num_windows": 10**6,
    "stride": MOST_TOKENS,
    "last_k": MOST_TOKENS,
    "chunk_len": MOST_TOKENS,
    "task_lengths": MOST_TOKENS,
    "depths": 1,
    "num_prompts": 10**4,
}
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class EvaluationConfig:
    every: int = 0
    """Optimizer steps between evaluations during training; 0 evaluates only at the end, -1 never."""
    lengths: list[int] = field(default_factory=list)
    """Window lengths in tokens. The same tokens are scored at every length. An empty list takes 1, 2, 4, 8 and 16
    times L, as far as the scaling serves them and the held-out documents are that long."""
    protocols: list[Protocol] = field(default_factory=lambda: [Protocol.one_shot])
    """`one_shot`: windows of N, t fixed by N; `chunked` (official): chunks of L through the cache, t grows; `sliding`:
    windows moved by `stride`; `per_position`: nll against position; `last_k`: a window's last tokens alone."""
    methods: list[Method] = field(default_factory=lambda: [Method.trained], metadata={"choices": Method})
    """`trained` is the model as it is, `clex` the same where it holds a CLEX, `lm_infinite` plain frequencies and the
    Lambda-shaped mask. The others put their frequencies into the same weights (docs/recipes.md); `none` and
    `random_pos` are plain RoPE."""
    rope_theta: float = 1e6
    """Base of `theta`, in place of the model's (Code Llama's by default)."""
    dynamic_factor: float | None = None
    """Factor of `dynamic_ntk`; by default t. 1 is the dynamic NTK of the YaRN paper, 2 is `ntk`."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` and `long_factor`, a number for each pair, for `longrope` on a model without."""
    method_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of methods that have no key here, as `evaluation.method_options.METHOD.NAME=value`: the fields of their
    classes in `clex_train/scaling/methods`."""
    n_local: int | None = None
    """Latest tokens that `lm_infinite` sees; by default t * L, with t that of `lm_infinite_t`."""
    n_global: int = 10
    """First tokens that `lm_infinite` sees."""
    lm_infinite_t: float = 1.0
    """t of the model's own table, which `lm_infinite` keeps at every length; 1 is plain frequencies."""
    lm_infinite_top_k: int = 0
    """Best keys between the first and the latest tokens that each query of `lm_infinite` also sees, at distance
    n_local / 2; the paper's option has 5."""
    lm_infinite_top_k_layer: int = 5
    """First layer that sees them."""
    t_factor: float | None = None
    """`trained` and `clex` take the t of a text this many times as long, up to t_max; by default as it was made."""
    path: str | None = None
    """Token store whose validation split is read; by default that of `data.path`; a mixture has to name one."""
    allow_overlap: bool = False
    """Evaluate also on a store that shares documents with the training data: a warning instead of an error."""
    bos: Bos = Bos.auto
    """BOS at the beginning of windows and prompts, in place of a token that is not scored. `auto`: as in the store's
    documents; a store without a record of it has none."""
    num_windows: int = 32
    """Windows of the largest length that are scored (fewer if the split has fewer)."""
    stride: int = 256
    """Tokens by which `sliding` moves its windows of N, so that N - stride or more are a token's context."""
    last_k: int | None = None
    """Tokens at the end of the largest window that `last_k` scores; by default L."""
    chunk_len: int = 1024
    """Tokens of a window per forward: bounds the memory of logits, not the result."""
    offload_cache: bool = False
    """Cached keys and values wait in host memory and visit the GPU layer by layer: slower, for longer texts."""
    tasks: list[Task] = field(default_factory=list)
    """Retrieval tasks beside perplexity: `passkey` (LM-Infinite's form), `passkey_infinitebench`, `needle` (in real
    text), `ruler` (all of RULER but question answering), or RULER's tasks by name."""
    task_lengths: list[int] | None = None
    """Tokens of a task's prompt and answer together; by default `lengths`."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where in the text the hidden fact stands, from 0 (start) to 1 (end)."""
    num_prompts: int = 10
    """Prompts of a task at each length and depth."""
    chat_template: bool = False
    """Tasks are asked as a user does in the chat template of the tokenizer, for instruct models."""

    def __post_init__(self) -> None:
        require_at_most(self, "evaluation.", MOST)
        require(self.every >= -1, "evaluation.every", self.every, "-1 (never), 0 (at the end) or a number of steps")
        if self.lengths:
            self._check_lengths()
        require(len(self.methods) > 0, "evaluation.methods", self.methods, "one or more methods")
        require(
            len(self.protocols) > 0 or len(self.tasks) > 0,
            "evaluation.protocols",
            self.protocols,
            "one or more protocols (or none, and evaluation.tasks)",
        )
        require(self.rope_theta > 1, "evaluation.rope_theta", self.rope_theta, "a base greater than 1")
        require(
            self.dynamic_factor is None or self.dynamic_factor >= 1,
            "evaluation.dynamic_factor",
            self.dynamic_factor,
            "1 or more",
        )
        for name in self.method_options:
            known = ", ".join(method.value for method in Method)
            require(name in Method.__members__, "evaluation.method_options", name, f"no such method; one of {known}")
        require(self.num_windows >= 1, "evaluation.num_windows", self.num_windows, "at least 1 window")
        require(self.stride >= 1, "evaluation.stride", self.stride, "at least 1 token")
        require(self.last_k is None or self.last_k >= 1, "evaluation.last_k", self.last_k, "at least 1 token")
        require(self.n_local is None or self.n_local >= 1, "evaluation.n_local", self.n_local, "at least 1 token")
        require(self.n_global >= 0, "evaluation.n_global", self.n_global, "0 or more tokens")
        require(self.lm_infinite_t >= 1, "evaluation.lm_infinite_t", self.lm_infinite_t, "a scale factor of at least 1")
        require(self.lm_infinite_top_k >= 0, "evaluation.lm_infinite_top_k", self.lm_infinite_top_k, "0 or more keys")
        layer = self.lm_infinite_top_k_layer
        require(layer >= 0, "evaluation.lm_infinite_top_k_layer", layer, "the index of a layer, from 0")
        require(self.t_factor is None or self.t_factor >= 1, "evaluation.t_factor", self.t_factor, "1 or more")
        require(self.chunk_len >= 1, "evaluation.chunk_len", self.chunk_len, "at least 1 token")
        retrieval.check(self.tasks, self.num_prompts, self.depths, self.task_lengths)

    def _check_lengths(self) -> None:
        require(all(n >= 2 for n in self.lengths), "evaluation.lengths", self.lengths, "each has at least 2 tokens")
        shortest, longest = min(self.lengths), max(self.lengths)
        require(
            all(longest % n == 0 and n % shortest == 0 for n in self.lengths),
            "evaluation.lengths",
            self.lengths,
            "each must be a multiple of the shortest and divide the longest, so that all score the same tokens",
        )
        require(
            Protocol.sliding not in self.protocols or self.stride <= shortest,
            "evaluation.stride",
            self.stride,
            f"more than the shortest of evaluation.lengths={self.lengths}, so windows would leave tokens out; "
            f"say evaluation.stride={shortest} or less",
        )

    def method_settings(self) -> dict[str, Any]:
        """The keys of this group that are settings of a method, by the field of its class."""
        names = ("rope_theta", "dynamic_factor", "longrope_factors", "lm_infinite_t")
        return {name: getattr(self, name) for name in names}

    def lengths_of_tasks(self) -> list[int]:
        """Lengths of the retrieval prompts, in tokens."""
        return self.lengths if self.task_lengths is None else self.task_lengths

    def longest(self) -> int:
        """The most tokens that any part of the evaluation reads at a time."""
        return max([*(self.lengths if self.protocols else []), *(self.lengths_of_tasks() if self.tasks else [])])
