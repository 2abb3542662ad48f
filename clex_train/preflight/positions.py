"""Warn of sampled positions that pretrained weights cannot read, or that cost them more than they bring.

`random` and `uniform` stretch a row of n tokens over t * L positions, so neighbours are t * L / n apart on average.
With rows of L tokens this is the paper's training, whose t begins at 1. With shorter rows no step has neighbours 1
apart, and the start of training destroys much of what the weights know. `skip` keeps neighbours 1 apart, but the jumps
between its chunks grow with t * L / n.
"""

from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.utils import distributed, log

logger = log.get(__name__)

MEASURED = "loss 4.0 became 9.4 for SmolLM2-135M, L = 8,192, on rows of 256"
"""At t = 1.1, 32 positions apart, for `random`; 9.5 for `uniform`, and 4.4 for `skip`."""

SHORT = 4
"""Rows below L / SHORT are warned of under `skip`."""


def warn_of_short_rows(config: Config, context_len: int) -> None:
    """Log a warning if most steps of pretrained weights would spread rows far below L by `skip`; L is `context_len`."""
    scaling, row_len = config.scaling, config.data.seq_len
    # A formula has one spectrum, so its steps as used are no plain training.
    is_spread = scaling.name is Method.clex and scaling.positions is Positions.skip and scaling.as_used < 0.5
    if not (is_spread and config.model.is_pretrained and row_len * SHORT < context_len and distributed.is_main()):
        return
    logger.warning(
        "scaling.positions=skip: rows of %s tokens are L / %.3g, and jumps between their chunks are as long as many "
        "rows; so trained, SmolLM2-135M on rows of L / 8 was 2 %% worse at L and 6 %% at 4 L than trained plainly "
        "(docs/results.md); set data.seq_len=0 for rows of L tokens, or scaling.as_used=0.8, 0.1 %% and 0.5 %% worse "
        "there, or 1 to train plainly and serve longer contexts by scaling.drift alone",
        f"{row_len:,}",
        context_len / row_len,
    )


def warn_of_stretched_rows(config: Config, context_len: int) -> None:
    """Log a warning if pretrained weights would train on rows shorter than L that are stretched over t * L.

    `context_len` is L in tokens. Not a refusal: slightly shorter rows do little harm, and studies compare positions.
    """
    scaling, row_len = config.scaling, config.data.seq_len
    share = _stretched_share(scaling)
    is_pretrained = config.model.is_pretrained and scaling.name is not Method.none
    if not (is_pretrained and row_len < context_len and share and distributed.is_main()):
        return
    logger.warning(
        "scaling.positions=%s: %s of %s tokens, shorter than L = %s, are stretched until neighbours are %.3g or more "
        "positions apart on average, which pretrained weights have never seen (%s); set scaling.positions=skip, which "
        "keeps neighbours 1 apart, or data.seq_len=0 for rows of L tokens",
        scaling.positions.name,
        "rows" if share == 1 else f"{100 * share:.3g} % of the rows",
        f"{row_len:,}",
        f"{context_len:,}",
        context_len / row_len,
        MEASURED,
    )


def _stretched_share(scaling: ScalingConfig) -> float:
    """Return the share of rows whose positions are stretched over t * L."""
    if scaling.positions is Positions.mix:
        return scaling.mix_random
    return float(scaling.positions in (Positions.random, Positions.uniform))
