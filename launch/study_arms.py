"""The arms of the study: what each is called, what it changes, and the methods its weights are evaluated with.

`MAIN` is the table, with several seeds; `ABLATIONS` change one thing of the recipe `clex`, one seed each; `LONG` trains
on rows four times as long with the same number of tokens, as position interpolation is usually trained.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to train the base on."""

    name: str
    """Folder of its runs."""
    label: str
    """Its row in the table."""
    overrides: tuple[str, ...]
    """What it sets on the command line of `train.py`."""
    methods: tuple[str, ...] = ("trained",)
    """Evaluated on its weights; `trained` is the model as it was trained."""


BASE_METHODS = ("none", "pi", "ntk", "dynamic_ntk", "yarn", "theta", "lm_infinite")
"""Training-free, on the base."""

CLEX = ("scaling=clex", "scaling.positions=skip", "scaling.lr_scale=0.002", "scaling.log_scale=eval")
"""The recipe under test, which each ablation changes in one place."""

FIXED = ("scaling.factor=16", "scaling.positions=skip")
"""A formula's frequencies at one factor, rows of L spread over 16 L: as PoSE trains, arXiv 2309.10400."""

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
        ("scaling=clex", "scaling.positions=random", "scaling.lr_scale=1", "scaling.max_residual=1000"),
    ),
    Arm("clex", "CLEX, our recipe", CLEX),
)

ABLATIONS = (
    Arm("positions_random", "positions random", (*CLEX, "scaling.positions=random")),
    Arm("positions_uniform", "positions uniform", (*CLEX, "scaling.positions=uniform")),
    Arm("positions_mix", "positions mix", (*CLEX, "scaling.positions=mix")),
    Arm("frozen", "field frozen at zero", (*CLEX, "scaling.lr_scale=0")),
    Arm("lr_scale_0.05", "lr_scale 0.05", (*CLEX, "scaling.lr_scale=0.05")),
    Arm("lr_scale_1", "lr_scale 1", (*CLEX, "scaling.lr_scale=1")),
    Arm("t_max_32", "t_max 32", (*CLEX, "scaling.t_max=32")),
    Arm("t_max_32_lr_0.05", "t_max 32, lr_scale 0.05", (*CLEX, "scaling.t_max=32", "scaling.lr_scale=0.05")),
    Arm("log_uniform", "t log-uniform", (*CLEX, "scaling.t_distribution=log_uniform")),
    Arm("log_scale_off", "no log-scaling", (*CLEX, "scaling.log_scale=off")),
    Arm("steps_600", "twice as many steps", (*CLEX, "optim.steps=600")),
)

ROWS_4L = ("data.seq_len=512", "optim.batch_rows=3")

LONG = (
    Arm("long_pi", "rows of 4L, PI, factor 4", ("scaling=pi", "scaling.factor=4", *ROWS_4L)),
    Arm("long_yarn", "rows of 4L, YaRN, factor 4", ("scaling=yarn", "scaling.factor=4", *ROWS_4L)),
)
