"""Arms of the study: name, overrides, and the methods that the weights are evaluated with.

Every arm is scored on windows for choosing, with the first seed. Those that are `judged`, what was chosen and its
controls, are scored with all seeds on windows that chose nothing, by a plan committed before (docs/results.md).
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
    evaluation: tuple[str, ...] = ("log_scale=eval",)
    """Overrides for the evaluation."""
    judged: bool = False
    """True for an arm that is scored on the windows for judging, with every seed."""


BASE_METHODS = ("none", "yarn", "ntk", "dynamic_ntk", "lm_infinite")
"""Training-free methods, evaluated on the base model."""

# YaRN's own label does not say that an evaluation takes the factor of each length, where the arms have one factor.
TITLES = {name: methods.create(Method(name)).label for name in ("trained", *BASE_METHODS)} | {
    "yarn": "YaRN at the factor of the length"
}

FIXED = ("scaling.factor=16", "scaling.positions=skip")
"""Frequencies at one factor, with rows of L spread over 16 L as in PoSE, arXiv 2309.10400."""
STATIC = ("scaling=static", *FIXED)
USED = "scaling.as_used=0.2"
CLEX = ("scaling=clex", "scaling.t_max=32", "scaling.t_factor=2", "scaling.positions=skip", "scaling.log_scale=eval")
"""CLEX by the recipe of the first study: t to twice what is evaluated, and in use the t of twice the length."""
TODAY = (*CLEX, "scaling.field=paper", "scaling.lr_scale=0.002", "scaling.as_used=0")
LOG_TIME = (*CLEX, "scaling.field=log_time", "scaling.lr_scale=1")
PLAIN: tuple[str, ...] = ()
"""Evaluation without log-scaling."""

TRAINED_ON = Arm(
    "continued", "trained on", ("scaling=none",), ("none", "yarn", "ntk", "lm_infinite"), evaluation=PLAIN, judged=True
)
YARN = Arm("yarn", "YaRN, factor 16", ("scaling=yarn", *FIXED), evaluation=PLAIN, judged=True)

# Names are folders of existing runs: renaming one orphans its results.
ARMS = (
    TRAINED_ON,
    YARN,
    Arm("yarn_log", "YaRN, factor 16, log-scaling", (), weights_of="yarn"),
    Arm("ntk", "NTK, factor 16", ("scaling=ntk", *FIXED), judged=True),
    Arm("theta", "theta 1e6", ("scaling=theta", *FIXED), judged=True),
    Arm("cope", "CoPE", ("scaling=cope", *FIXED), judged=True),
    Arm("p_rope", "p-RoPE", ("scaling=p_rope", *FIXED), judged=True),
    Arm("evq", "EVQ-Cosh", ("scaling=evq", *FIXED), judged=True),
    Arm("clex_paper", "CLEX, the paper's recipe", ("scaling=clex_paper", "scaling.max_residual=1000"), judged=True),
    Arm("clex_today", "CLEX of the first study", TODAY, judged=True),
    Arm("frozen", "NTK drift, frozen", (*TODAY, "scaling.lr_scale=0"), judged=True),
    Arm("frozen_used", "NTK drift, frozen, as used", (*TODAY, "scaling.lr_scale=0", USED), judged=True),
    Arm("frozen_yarn", "YaRN drift, frozen, as used", (*LOG_TIME, "scaling.lr_scale=0", "scaling.drift=yarn", USED)),
    Arm("log_time", "log-time field", LOG_TIME, judged=True),
    Arm("log_time_used", "log-time field, as used", (*LOG_TIME, USED), judged=True),
    Arm("log_time_yarn", "log-time field on YaRN's drift, as used", (*LOG_TIME, "scaling.drift=yarn", USED)),
    Arm("direction", "one direction, as used", (*LOG_TIME, "scaling.field=direction", "scaling.lr_scale=7", USED)),
    Arm("static", "static, from YaRN-16, as used", (*STATIC, USED), judged=True),
    Arm("static_unused", "static, from YaRN-16", (*STATIC, "scaling.as_used=0"), judged=True),
    Arm("static_plain", "static, as used, without log-scaling", (), weights_of="static", evaluation=PLAIN),
    Arm(
        "static_tempered",
        "static, from YaRN-16 with its attention factor, as used",
        (*STATIC, "+scaling.options.attention_factor=1.2772588722", USED),
        evaluation=PLAIN,
        judged=True,
    ),
    Arm("static_ntk", "static, from NTK-16, as used", (*STATIC, "+scaling.options.start=ntk", USED)),
    Arm("static_32", "static, from YaRN-32, as used", (*STATIC, "scaling.factor=32", USED)),
    Arm("ramp", "YaRN with a learned ramp, as used", (*STATIC, "+scaling.options.learn=ramp", USED)),
    Arm("yarn_used", "YaRN, factor 16, as used", ("scaling=yarn", *FIXED, USED), evaluation=PLAIN, judged=True),
)

REFERENCE = YARN.label
"""Row from which the differences in the tables are counted."""
TAX_AGAINST = f"{TRAINED_ON.label}, {TITLES['none']}"
"""Row that the tax at 1x is counted from: the base trained on as long."""
