"""Arms of the study: name, overrides, and the methods that the weights are evaluated with.

`ABLATIONS` change one thing of `START`, with one seed each, and are scored on windows for model selection. `MAIN` has
the selected recipe, `CLEX`, and all other methods, with several seeds, on windows that selected nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to continue training from the base model."""

    name: str
    """Name of its folder of runs."""
    label: str
    """Label of its row in the table."""
    overrides: tuple[str, ...]
    """Overrides for `train.py`."""
    methods: tuple[str, ...] = ("trained",)
    """Methods to evaluate on its weights; `trained` is the model as trained."""
    weights_of: str | None = None
    """Arm whose weights to evaluate; None: train its own."""
    evaluation: tuple[str, ...] = ()
    """Overrides for the evaluation."""


@dataclass(frozen=True)
class Windows:
    """Selection of windows of the held-out books."""

    name: str
    """Name of the evaluation file."""
    seed: int


# Different seeds draw different windows, so that the main table does not reward the selection.
CHOOSING, JUDGING = Windows("choosing", 0), Windows("judging", 1)

BASE_METHODS = ("none", "pi", "ntk", "dynamic_ntk", "yarn", "theta", "lm_infinite")
"""Training-free methods, evaluated on the base model."""

START = (
    "scaling=clex",
    "scaling.t_max=16",
    "scaling.t_factor=1",
    "scaling.positions=skip",
    "scaling.lr_scale=0.002",
    "scaling.log_scale=eval",
)
"""Recipe of the quick start, from which the ablations start."""

CLEX = (*START, "scaling.t_max=32")
"""Selected recipe: t is drawn up to twice the evaluated factor, which leaves room for `t_factor=2`."""

CLEX_FAST = (*CLEX, "scaling.lr_scale=0.05")
"""The same with an ODE that learns 25 times as fast: better, but the spike guard stopped one seed in three."""

FIXED = ("scaling.factor=16", "scaling.positions=skip")
"""Frequencies of a formula at one factor, with rows of L spread over 16 L as in PoSE, arXiv 2309.10400."""

# Names are folders of existing runs and JSON keys of results: renaming one orphans its results.
MAIN = (
    Arm("continued", "trained on", ("scaling=none",), ("none", "ntk", "yarn", "lm_infinite")),
    Arm("pi", "PI, factor 16", ("scaling=pi", *FIXED)),
    Arm("ntk", "NTK, factor 16", ("scaling=ntk", *FIXED)),
    Arm("yarn", "YaRN, factor 16", ("scaling=yarn", *FIXED)),
    Arm("theta", "theta 1e6", ("scaling=theta", *FIXED)),
    Arm("random_pos", "RandomPos", ("scaling=random_pos", "scaling.t_max=16")),
    Arm(
        "clex_paper",
        "CLEX, the paper's recipe",
        ("scaling=clex_paper", "scaling.max_residual=1000"),
    ),
    Arm("clex", "CLEX, t of the length", CLEX),
    Arm("clex_t_factor_2", "CLEX, our recipe", (), weights_of="clex", evaluation=("t_factor=2",)),
    Arm("clex_fast", "CLEX, lr_scale 0.05", CLEX_FAST),
    Arm("clex_frozen", "CLEX frozen at zero, t of the length", (*CLEX, "scaling.lr_scale=0")),
    Arm("clex_frozen_t_factor_2", "CLEX frozen at zero", (), weights_of="clex_frozen", evaluation=("t_factor=2",)),
)

# One seed each: selection needs a ranking, not error bars over seeds.
ABLATIONS = (
    Arm("start", "CLEX, the quick start's recipe", START),
    Arm("positions_random", "positions random", (*START, "scaling.positions=random")),
    Arm("positions_uniform", "positions uniform", (*START, "scaling.positions=uniform")),
    Arm("positions_mix", "positions mix", (*START, "scaling.positions=mix")),
    Arm("frozen", "field frozen at zero", (*START, "scaling.lr_scale=0")),
    Arm("lr_scale_0.05", "lr_scale 0.05", (*START, "scaling.lr_scale=0.05")),
    Arm("lr_scale_1", "t_max 32, lr_scale 1", (*CLEX, "scaling.lr_scale=1", "scaling.max_residual=1000")),
    Arm("t_max_32", "t_max 32: chosen", CLEX),
    Arm("t_factor_1.5", "t_max 32, t of 1.5 times the length", (), weights_of="t_max_32", evaluation=("t_factor=1.5",)),
    Arm("t_factor_2", "t_max 32, t of twice the length", (), weights_of="t_max_32", evaluation=("t_factor=2",)),
    Arm("log_uniform", "t log-uniform", (*START, "scaling.t_distribution=log_uniform")),
    Arm("t_max_32_lr_0.05", "t_max 32, lr_scale 0.05", CLEX_FAST),
    Arm("log_scale_off", "no log-scaling", (*START, "scaling.log_scale=off")),
    Arm("steps_600", "t_max 32, twice as many steps", (*CLEX, "optim.steps=600")),
)
