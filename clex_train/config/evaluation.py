"""Config group `evaluation`: lengths, protocols, methods and retrieval tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clex_train.config import measures, retrieval
from clex_train.config.bos import Bos
from clex_train.config.measures import Measure
from clex_train.config.method import EVALUATED, Method
from clex_train.config.retrieval import Task
from clex_train.config.scaling import LogScale
from clex_train.utils.bounds import MOST_ROPE_THETA, MOST_SCALE, MOST_STEPS, MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


class Protocol(Enum):
    """Ways of scoring a long text."""

    one_shot = "one_shot"
    chunked = "chunked"
    sliding = "sliding"
    per_position = "per_position"
    last_k = "last_k"
    long_ppl = "long_ppl"
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
    "distances": MOST_TOKENS,
    "num_distractors": 10**3,
}
"""Upper bounds that catch typing errors."""


@dataclass
class EvaluationConfig:
    """The `evaluation` group: lengths, methods, protocols, retrieval tasks."""

    every: int = 0
    """Optimizer steps between evaluations during training; 0: only at the end, -1: never."""
    lengths: list[int] = field(default_factory=list)
    """Window lengths in tokens; the same tokens are scored at every length. Empty: 1, 2, 4, 8 and 16 times L, up to
    what the scaling serves and the longest held-out document."""
    protocols: list[Protocol] = field(default_factory=lambda: [Protocol.one_shot])
    """`one_shot`: windows of N, t fixed by N; `chunked` (official): chunks of L through the cache, t grows; `sliding`:
    windows that move by `stride`; `per_position`: NLL by position; `last_k`: only the last tokens of a window;
    `long_ppl`: the spans of `sliding`, only the tokens of `key_tokens` (LongPPL)."""
    methods: list[Method] = field(default_factory=lambda: [Method.trained], metadata={"choices": EVALUATED})
    """`trained`: the model as trained; `clex`: the same for a model with CLEX; `lm_infinite`: plain frequencies and the
    Lambda-shaped mask. The others put their frequencies into the same weights (docs/recipes.md); `none` and
    `random_pos` are plain RoPE."""
    rope_theta: float = 1e6
    """RoPE base for `theta`, above 1 (default: Code Llama's)."""
    dynamic_factor: float | None = None
    """Factor of `dynamic_ntk`, at least 1; null: t. 1 is the dynamic NTK of the YaRN paper, 2 equals `ntk`."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` and `long_factor`, one number per pair, for `longrope` on a model without them."""
    method_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of methods without a key here, as `evaluation.method_options.METHOD.NAME=value`: the fields of their
    classes in `clex_train/scaling/methods`."""
    n_local: int | None = None
    """Latest tokens visible with `lm_infinite`; null: t * L, with t = `lm_infinite_t`."""
    n_global: int = 10
    """First tokens visible with `lm_infinite`, 0 or more."""
    lm_infinite_t: float = 1.0
    """t of the model's own table, which `lm_infinite` uses at every length, at least 1; 1 means plain frequencies."""
    lm_infinite_top_k: int = 0
    """Best keys between the first and the latest tokens that each query of `lm_infinite` also attends to, at distance
    n_local / 2; 0: none. The paper's option uses 5."""
    lm_infinite_top_k_layer: int = 5
    """First layer that attends to them, counted from 0."""
    t_factor: float | None = None
    """`trained` and `clex` use the t of a context this many times as long, up to t_max; null: as in the model."""
    log_scale: LogScale | None = None
    """Scale attention logits by this policy of `scaling.log_scale` for every method; null: as the model does."""
    path: str | None = None
    """Token store whose validation split is evaluated; null: that of `data.path`. A mixture must name one."""
    allow_overlap: bool = False
    """Evaluate even on a store that shares documents with the training data, with a warning instead of an error."""
    bos: Bos = Bos.auto
    """BOS at the beginning of windows and prompts, in place of an unscored token. `auto`: as in the store's documents;
    none for a store without a record of it."""
    num_windows: int = 32
    """Windows of the largest length to score (fewer if the split has fewer), at least 1."""
    stride: int = 256
    """Tokens by which `sliding` moves its windows of N, so that each token has at least N - stride of context."""
    last_k: int | None = None
    """Tokens at the end of the largest window that `last_k` scores; null: L."""
    key_tokens: str | None = None
    """File of the key tokens that `long_ppl` scores, written by `data_prep.key_tokens` for the same windows."""
    chunk_len: int = 1024
    """Tokens of a window per forward pass; bounds the memory of logits without changing the result."""
    offload_cache: bool = False
    """Keep cached keys and values in host memory and load them layer by layer: slower, but longer texts fit."""
    tasks: list[Task] = field(default_factory=list)
    """Retrieval tasks in addition to perplexity: `passkey` (LM-Infinite's form), `passkey_infinitebench`, `needle` (in
    real text), `ruler` (all of RULER except question answering), or single tasks of RULER."""
    task_lengths: list[int] | None = None
    """Tokens of prompt and answer of a task or a measure together; null: `lengths`."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Relative positions of the hidden fact in the text, from 0 (start) to 1 (end)."""
    num_prompts: int = 10
    """Prompts per task or measure, length and depth (or distance), at least 1."""
    chat_template: bool = False
    """Format task prompts as user turns with the tokenizer's chat template, for instruct models."""
    measures: list[Measure] = field(default_factory=list)
    """Measures by teacher forcing, for models of any size: `forced_passkey` (a pass key in held-out text),
    `forced_passkey_noise` (in repeated sentences, after a notice), `repetition` (NLL of a statement's second appearance
    against the distance to the first)."""
    distances: list[int] | None = None
    """Tokens between the two appearances of `repetition`; null: 64, 128, ... up to half of each length."""
    baseline: str | None = None
    """Evaluation file of the base that was trained on: tables then show the short-context tax, the perplexity at L
    (or the shortest length) above the base's on the same tokens."""
    num_distractors: int = 0
    """Statements about other names between the two appearances of `repetition`, 0 or more."""

    def __post_init__(self) -> None:
        require_at_most(self, "evaluation.", MOST)
        require(self.every >= -1, "evaluation.every", self.every, "-1 (never), 0 (at the end) or a number of steps")
        # An empty list means lengths that follow from the model, checked once they are known.
        if self.lengths:
            self._check_lengths()
        require(len(self.methods) > 0, "evaluation.methods", self.methods, "one or more methods")
        for method in self.methods:
            remedy = "has learned factors only in a model trained by scaling=static, which `trained` reads"
            require(method in EVALUATED, "evaluation.methods", method.value, remedy)
        require(
            # Retrieval alone is a valid evaluation.
            len(self.protocols) > 0 or len(self.tasks) > 0 or len(self.measures) > 0,
            "evaluation.protocols",
            self.protocols,
            "one or more protocols (or none, and evaluation.tasks or evaluation.measures)",
        )
        # At base 1 all frequencies are equal, and below it they grow.
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
        # A stride of 0 would never finish.
        require(self.stride >= 1, "evaluation.stride", self.stride, "at least 1 token")
        require(self.last_k is None or self.last_k >= 1, "evaluation.last_k", self.last_k, "at least 1 token")
        require(self.n_local is None or self.n_local >= 1, "evaluation.n_local", self.n_local, "at least 1 token")
        require(self.n_global >= 0, "evaluation.n_global", self.n_global, "0 or more tokens")
        require(self.lm_infinite_t >= 1, "evaluation.lm_infinite_t", self.lm_infinite_t, "a scale factor of at least 1")
        require(self.lm_infinite_top_k >= 0, "evaluation.lm_infinite_top_k", self.lm_infinite_top_k, "0 or more keys")
        layer = self.lm_infinite_top_k_layer
        require(layer >= 0, "evaluation.lm_infinite_top_k_layer", layer, "the index of a layer, from 0")
        require(self.t_factor is None or self.t_factor >= 1, "evaluation.t_factor", self.t_factor, "1 or more")
        wanted = Protocol.long_ppl in self.protocols
        remedy = "the protocol long_ppl scores the tokens of a file; set both, or neither"
        require(wanted == (self.key_tokens is not None), "evaluation.key_tokens", self.key_tokens, remedy)
        require(self.chunk_len >= 1, "evaluation.chunk_len", self.chunk_len, "at least 1 token")
        # Retrieval has its own module: the tasks of RULER are a list of their own.
        retrieval.check(self.tasks, self.num_prompts, self.depths, self.task_lengths)
        measures.check(self.measures, self.distances, self.num_distractors)

    def _check_lengths(self) -> None:
        require(all(n >= 2 for n in self.lengths), "evaluation.lengths", self.lengths, "each has at least 2 tokens")
        shortest, longest = min(self.lengths), max(self.lengths)
        # Windows of all lengths must end at the same tokens, or perplexities would not be comparable.
        require(
            all(longest % n == 0 and n % shortest == 0 for n in self.lengths),
            "evaluation.lengths",
            self.lengths,
            "each must be a multiple of the shortest and divide the longest, so that all score the same tokens",
        )
        require(
            # Only these two use the stride; other protocols ignore it.
            not {Protocol.sliding, Protocol.long_ppl} & set(self.protocols) or self.stride <= shortest,
            "evaluation.stride",
            self.stride,
            f"more than the shortest of evaluation.lengths={self.lengths}, so windows would leave tokens out; "
            f"set evaluation.stride={shortest} or less",
        )

    def method_settings(self) -> dict[str, Any]:
        """Collect the keys of this group that are settings of a method, by the field of its class."""
        names = ("rope_theta", "dynamic_factor", "longrope_factors", "lm_infinite_t")
        return {name: getattr(self, name) for name in names}

    def lengths_of_tasks(self) -> list[int]:
        """Return the lengths of the prompts of tasks and measures, in tokens."""
        return self.lengths if self.task_lengths is None else self.task_lengths

    def longest(self) -> int:
        """Return the largest number of tokens that any part of the evaluation reads at a time."""
        return max(
            [*(self.lengths if self.protocols else []), *(self.lengths_of_tasks() if self.has_prompts() else [])]
        )

    def has_prompts(self) -> bool:
        """Return True if prompts are written, which needs the tokenizer."""
        return bool(self.tasks or self.measures)
