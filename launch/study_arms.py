"""Arms of the study: name, overrides, and the methods that the weights are evaluated with.

Arms that are `choosing` are scored with the first seed on windows for choosing. Those that are `judged`, what was
chosen and its controls, are scored on windows that chose nothing, by a plan committed before (docs/results.md).
"""

from dataclasses import dataclass

from clex_train.config.method import Method
from clex_train.scaling import methods


@dataclass(frozen=True)
class Windows:
    """Selection of windows of the held-out books."""

    name: str
    """Name of the evaluation file."""
    seed: int


# Seeds 0 and 1 chose and judged the first study, so nobody may choose by them again.
CHOOSING, JUDGING = Windows("choosing", 10), Windows("judging", 11)


@dataclass(frozen=True)
class Arm:
    """One way to continue training from the base model."""

    name: str
    """Name of its folder of runs."""
    label: str
    """Label of its row in the tables."""
    overrides: tuple[str, ...]
    """Overrides for `train.py`."""
    methods: tuple[str, ...] = ("trained",)
    """Methods to evaluate on its weights; `trained` is the model as trained."""
    weights_of: str | None = None
    """Arm whose weights to evaluate; None: train its own."""
    evaluation: tuple[str, ...] = ()
    """Overrides for the evaluation."""
    choosing: bool = False
    """True for an arm that is scored on the windows for choosing, with the first seed."""
    judged: int = 0
    """Number of seeds that are scored on the windows for judging."""


BASE_METHODS = ("none", "yarn", "ntk", "dynamic_ntk", "lm_infinite")
"""Training-free methods, evaluated on the base model."""

# YaRN's own label does not say that an evaluation takes the factor of each length, where the arms have one factor.
TITLES = {name: methods.create(Method(name)).label for name in ("trained", *BASE_METHODS)} | {
    "yarn": "YaRN at the factor of the length"
}

CLAIMED = 3
"""Seeds of what is claimed; a neighbour that nothing is claimed of has one."""

FIXED = ("scaling.factor=16", "scaling.positions=skip")
"""Frequencies at one factor, with rows of L spread over 16 L as in PoSE, arXiv 2309.10400."""
USED = "scaling.as_used=0.2"
CLEX = ("scaling=clex",)
"""Our recipe: YaRN's path with moving t and its temperature, and a field that learns the rest."""
FROZEN = "scaling.lr_scale=0"
"""The field stays zero: what is left of CLEX is its drift."""
NTK = ("scaling=clex_ntk",)
"""The recipe of the first study: NTK's path, and in use the t of twice the length."""
STATIC = ("scaling=static", *FIXED, USED)
"""Learned frequencies from YaRN-16, with its constant attention factor."""
NO_FACTOR = "+scaling.options.attention_factor=1"
PAPER = ("scaling=clex_paper", "scaling.t_max=32", "scaling.max_residual=1000")
"""With t to 32, since every arm is read to 32 L; the guard would stop it (docs/first_study.md)."""
HOT = "optim.lr=5.0e-4"
"""For arms that start far from what the base can read: at 1e-4 the NTK drift gets nowhere at 16 L (docs/results.md)."""


def rates(name: str, label: str, overrides: tuple[str, ...], judged: int) -> list[Arm]:
    """List an arm at each learning rate that was tried on the windows for choosing; judge it at `judged` e-4."""
    return [
        Arm(
            f"{name}_lr{rate}",
            label if rate == 1 else f"{label}, lr {rate}e-4",
            (*overrides, f"optim.lr={rate}.0e-4"),
            choosing=True,
            judged=CLAIMED if rate == judged else 0,
        )
        for rate in (1, 2, 5)
    ]


TRAINED_ON = Arm("continued", "trained on", ("scaling=none",), ("none", "yarn"), judged=CLAIMED)
YARN = Arm("yarn", "YaRN, factor 16", ("scaling=yarn", *FIXED), judged=CLAIMED)

# Names are folders of existing runs: renaming one orphans its results.
ARMS = (
    TRAINED_ON,
    YARN,
    *rates("yarn_used", "YaRN, factor 16, as used", ("scaling=yarn", *FIXED, USED), judged=1),
    Arm("static", "static, from YaRN-16, as used", STATIC, judged=CLAIMED),
    *rates("moving_yarn", "CLEX, field frozen", (*CLEX, FROZEN), judged=1),
    Arm("field", "CLEX, our recipe", CLEX, judged=CLAIMED),
    *rates("moving_ntk", "NTK drift, field frozen", (*NTK, FROZEN, USED), judged=5),
    Arm("clex_first", "CLEX of the first study, lr 5e-4", (*NTK, HOT), judged=CLAIMED),
    Arm(
        "ntk_token",
        "NTK drift, field frozen, log-scaling per token",
        (),
        weights_of="moving_ntk_lr5",
        evaluation=("log_scale=token_eval",),
        judged=1,
    ),
    # The winner without each of its parts.
    Arm("moving_yarn_unused", "CLEX, field frozen, no steps as used", (*CLEX, FROZEN, "scaling.as_used=0"), judged=1),
    Arm(
        "moving_yarn_ahead",
        "CLEX, field frozen, read at twice t",
        (),
        weights_of="moving_yarn_lr1",
        evaluation=("t_factor=2",),
        judged=1,
    ),
    Arm(
        "moving_yarn_log",
        "CLEX, field frozen, log-scaling besides",
        (),
        weights_of="moving_yarn_lr1",
        evaluation=("log_scale=eval",),
        judged=1,
    ),
    # Neighbours.
    Arm(
        "direction",
        "one learned direction for the field",
        (*CLEX, "scaling.field=direction", "scaling.lr_scale=7"),
        judged=1,
    ),
    Arm("ramp", "YaRN with a learned ramp", (*STATIC, "+scaling.options.learn=ramp"), judged=1),
    Arm(
        "static_log",
        "static, log-scaling instead of a factor",
        (*STATIC, NO_FACTOR),
        evaluation=("log_scale=eval",),
        judged=1,
    ),
    Arm("ntk", "NTK, factor 16, lr 5e-4", ("scaling=ntk", *FIXED, HOT), judged=1),
    Arm("theta", "theta 1e6, lr 5e-4", ("scaling=theta", *FIXED, HOT), judged=1),
    Arm("cope", "CoPE, lr 5e-4", ("scaling=cope", *FIXED, HOT), judged=1),
    Arm("p_rope", "p-RoPE, lr 5e-4", ("scaling=p_rope", *FIXED, HOT), judged=1),
    Arm("evq", "EVQ-Cosh, lr 5e-4", ("scaling=evq", *FIXED, HOT), judged=1),
    Arm("clex_paper", "CLEX, the paper's recipe, lr 5e-4", (*PAPER, HOT), judged=1),
)

REFERENCE = YARN.label
"""Row from which the differences in the tables are counted."""
TAX_AGAINST = f"{TRAINED_ON.label}, {TITLES['none']}"
"""Row that the tax at 1x is counted from: the base trained on as long."""
