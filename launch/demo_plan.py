"""Commands of the demo, in their order, each with the file that shows that it is done.

A reading of 32k costs 3.4 times one of 16k, so these come last, as `Extra`s: they run while the forecast fits the
minutes that are left. The number of training steps follows from the first readings, and is then kept (`steps_for`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable


@dataclass(frozen=True)
class Size:
    """Numbers of a demo."""

    folder: Path
    stores: Path
    context_len: int
    """L in tokens: the model's own, or less in a smoke run."""
    steps: int
    """Training steps of the control and of CLEX, each; `steps_for` chooses those of the full demo."""
    seq_len: int
    """Tokens of a training row, far below L."""
    last_k: int
    """Tokens at the end of a window that are scored."""
    new_tokens: int = 80
    windows: int = 1

    @property
    def is_smoke(self) -> bool:
        """Return True for numbers that mean nothing."""
        return self.folder == SMOKE.folder

    @property
    def lengths(self) -> tuple[int, int]:
        """L and 2 L."""
        return self.context_len, 2 * self.context_len

    @property
    def far(self) -> int:
        """4 L, the longest context of the demo."""
        return 4 * self.context_len


FULL = Size(Path("runs/demo"), Path("corpora"), context_len=8192, steps=40, seq_len=256, last_k=4096)
FAR = 3.4
"""Cost of a reading of 4 L in readings of 2 L: 46 TFLOP at 32k against 13.7 at 16k for this model."""
LEAST_STEPS, MOST_STEPS = 20, 300
SMOKE = Size(Path("runs/demo_smoke"), Path("corpora/smoke"), 512, steps=2, seq_len=64, last_k=256, new_tokens=8)
"""The same model said to have L = 512: every stage runs, and no number means anything."""


@dataclass(frozen=True)
class Stage:
    """A command and its result."""

    title: str
    result: Path
    command: list[str]


@dataclass(frozen=True)
class Extra:
    """Stages that run together if the time allows."""

    title: str
    stages: list[Stage]
    readings: float
    """Cost in readings of 2 L tokens."""


def beginning(size: Size, precision: str) -> list[Stage]:
    """List the commands before training, whose last one shows how fast this machine is."""
    untrained = evaluation(size, precision, "untrained", model(size), size.lengths, ["none", "yarn"])
    return [*preparation(size.folder, size.stores), untrained]


def steps_for(seconds: float, reading: float) -> int:
    """Return the training steps of each arm that fit into `seconds` beside everything else.

    `reading` is the time of a reading of 2 L tokens. Readings of 4 L are given their time if 40 steps still fit.
    """
    # A step of 512 tokens takes 0.42 TFLOP, a reading 13.7, and the optimizer about a second.
    step = 0.031 * reading + 1.0
    # Two readings of L and of 2 L, five minutes for starts, exports and llama.cpp.
    rest = seconds - 2 * 1.35 * reading - 300
    with_far = (rest - 3 * FAR * reading) / (2 * step)
    return max(LEAST_STEPS, min(MOST_STEPS, int(with_far if with_far >= 40 else rest / (2 * step))))


def stages(size: Size, precision: str, engines: Path | None) -> list[Stage]:
    """List the commands from training on; without `engines` (node-llama-cpp) the last one is left out."""
    folder = size.folder
    plan = [
        training(size, precision, "plain"),
        training(size, precision, "clex"),
        # YaRN at L is plain RoPE.
        evaluation(size, precision, "plain", run(size, "plain"), size.lengths, ["yarn"]),
        evaluation(size, precision, "clex", run(size, "clex"), size.lengths, ["trained"]),
        export(size, "huggingface", folder / "clex_huggingface"),
        export(size, "gguf", folder / "clex_gguf", ["weight_type=f16"]),
    ]
    if engines is not None:
        plan.append(generation(size, engines))
    return plan


def extras(size: Size, precision: str) -> list[Extra]:
    """List what runs if the time allows, the most valuable first."""
    far = (size.far,)
    trained = [
        evaluation(size, precision, "clex", run(size, "clex"), far, ["trained"], "_far"),
        evaluation(size, precision, "plain", run(size, "plain"), far, ["yarn"], "_far"),
    ]
    untrained = evaluation(size, precision, "untrained", model(size), far, ["yarn"], "_far")
    lm_infinite, ntk = (
        evaluation(size, precision, "untrained", model(size), size.lengths, [method], f"_{method}")
        for method in ("lm_infinite", "ntk")
    )
    return [
        Extra("LM-Infinite without training", [lm_infinite], 1),
        Extra(f"CLEX and plain training at {size.far:,} tokens", trained, 2 * FAR),
        Extra(f"the untrained model at {size.far:,} tokens", [untrained], FAR),
        Extra("NTK without training", [ntk], 1.4),
    ]


def preparation(folder: Path, stores: Path) -> list[Stage]:
    """Fetch model and books, and make a token store of each half."""
    # The smoke run reads the same files: they are fetched once.
    fetched = FULL.folder
    tokenize = [PYTHON, "-m", "data_prep", "tokenize", f"tokenizer={fetched / 'model'}"]
    found = []
    for part, share in (("train", 0), ("judge", 1)):
        store = stores / f"demo_{part}"
        names = [f"corpus.name=demo_{part}", f"corpus.paths=[{fetched / 'books' / part}]", f"output={store}"]
        command = [*tokenize, *names, f"corpus.validation_share={share}"]
        found.append(Stage(f"tokenize the books to {part}", store, command))
    apart = [f"train={stores / 'demo_train'}", f"evaluation={stores / 'demo_judge'}", f"report={folder / 'apart'}"]
    gguf, converted = fetched / "smollm2.gguf", fetched / "model"
    return [
        # The last file that the fetching writes.
        Stage("fetch", moreau(), [PYTHON, "-m", "launch.demo_fetch", str(fetched)]),
        Stage("convert the model", converted, [PYTHON, "-m", "data_prep.gguf_model", str(gguf), str(converted)]),
        *found,
        Stage("keep the halves apart", folder / "apart", [PYTHON, "-m", "data_prep", "decontaminate", *apart]),
    ]


def moreau() -> Path:
    """Return the held-out book that llama.cpp continues."""
    return FULL.folder / "books" / "judge" / "the_island_of_doctor_moreau.txt"


def model(size: Size) -> list[str]:
    """Return the arguments that name the untrained model."""
    return [f"model={FULL.folder / 'model'}", f"context_len={size.context_len}"]


def run(size: Size, name: str) -> list[str]:
    """Return the arguments that name a trained model."""
    # A model without a field does not record L, and a smoke run says that L is less.
    return [f"run={size.folder / name}", *([] if name == "clex" else [f"context_len={size.context_len}"])]


def evaluation(
    size: Size,
    precision: str,
    name: str,
    source: list[str],
    lengths: tuple[int, ...],
    methods: list[str],
    more: str = "",
) -> Stage:
    """Score the last tokens of held-out windows with more and more text before them."""
    result = size.folder / "evaluation" / f"{name}{more}.json"
    keys = [
        f"data={size.stores / 'demo_judge'}",
        f"methods=[{','.join(methods)}]",
        f"lengths=[{','.join(map(str, lengths))}]",
        "protocols=[last_k]",
        f"last_k={size.last_k}",
        f"num_windows={size.windows}",
        f"precision={precision}",
        f"label={name}{more}",
        f"output={result}",
    ]
    title = f"evaluate {name} ({', '.join(methods)}) at {', '.join(f'{n:,}' for n in lengths)} tokens"
    return Stage(title, result, [PYTHON, "-m", "clex_train.cli.evaluate", *source, *keys])


def training(size: Size, precision: str, name: str) -> Stage:
    """Train on short rows: the control without scaling, or CLEX with skip positions."""
    output = size.folder / name
    scaling = {
        "plain": ["scaling=none"],
        # t up to what the demo reads; the paper's random positions would destroy a pretrained model on rows this short.
        "clex": ["scaling=clex", "scaling.t_max=4", "scaling.t_factor=1", "scaling.positions=skip"],
    }[name]
    keys = [
        f"name=demo_{name}",
        f"output_dir={output}",
        f"model.path={FULL.folder / 'model'}",
        f"model.context_len={size.context_len}",
        f"data.path={size.stores / 'demo_train'}",
        f"data.seq_len={size.seq_len}",
        f"evaluation.path={size.stores / 'demo_judge'}",
        "evaluation=never",
        "engine=cpu",
        # One rank has nothing to shard, and ZeRO-3 took 1.7 times as long here, and 6.2 GB instead of 3.7.
        "engine.zero_stage=0",
        f"engine.precision={precision}",
        "tracking=local",
        f"optim.steps={size.steps}",
        "optim.batch_rows=2",
        "optim.lr=2e-5",
    ]
    title = f"train {'CLEX' if name == 'clex' else 'without scaling (the control)'}, {size.steps} steps"
    return Stage(title, output / "final", [PYTHON, "train.py", *keys, *scaling])


def export(size: Size, target: str, output: Path, more: list[str] | None = None) -> Stage:
    """Write the CLEX model at the t of 2 L for another program."""
    keys = [f"run={size.folder / 'clex'}", f"format={target}", f"length={size.lengths[1]}", f"output={output}"]
    return Stage(f"export to {target}", output, [PYTHON, "-m", "clex_train.cli.export", *keys, *(more or [])])


def generation(size: Size, engines: Path) -> Stage:
    """Continue a held-out book in llama.cpp from a prompt longer than L."""
    result = size.folder / "generated.json"
    numbers = [str(size.context_len + size.context_len // 16), str(size.new_tokens)]
    files = [str(engines), str(size.folder / "clex_gguf" / "model.gguf"), str(moreau()), *numbers, str(result)]
    return Stage("generate beyond L in llama.cpp", result, ["node", "launch/llama_cpp.mjs", *files])
