"""Key tokens of LongPPL (Fang et al., arXiv 2410.23771, section 3): those that a long context makes predictable.

    LSD_i = log p(x_i | all before) - log p(x_i | the K to K + S tokens before)         both under one evaluator
    key token:  LSD_i > alpha  and  log p(x_i | all before) > beta                      alpha = 2, beta = -2 nats
    LongPPL = exp(mean nll of the key tokens)                                           under the evaluated model

The list is made once, by `data_prep.key_tokens`, and stored as JSON beside the evaluation set. Shapes: `W` windows
of `N` tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clex_train.utils.errors import ConfigError, first_line, require
from clex_train.utils.files import BadFile, make_folder, write_atomically
from clex_train.utils.records import Count, decode, read_json

FORMAT = 1
LARGEST = 2**28
"""Largest list that is read, in bytes; a key token takes about 6."""


@dataclass(frozen=True)
class KeyTokens:
    """A list of key tokens, and everything that it was made from."""

    evaluator: dict[str, Any]
    """Path, hash of the weights and revision of the model that chose the tokens."""
    store: dict[str, Any]
    """Path and fingerprint of the token store."""
    windows: dict[str, Any]
    """Count, length and fingerprint of the windows."""
    short_context: Count
    """K: tokens of the short context at least."""
    stride: Count
    """S: tokens that share a short context, which has less than K + S tokens."""
    alpha: float
    beta: float
    positions: list[list[int]]
    """[W][...]: for each window, the ascending positions of its key tokens."""
    format: int = FORMAT

    @property
    def mask(self) -> np.ndarray:
        """Key tokens as bool [W, N]."""
        mask: np.ndarray = np.zeros((len(self.positions), int(self.windows["length"])), dtype=bool)
        # A list of rows, since the positions differ in number.
        for row, positions in zip(mask, self.positions, strict=True):
            row[positions] = True
        return mask


def choose(long_nll: np.ndarray, short_nll: np.ndarray, short_context: int, alpha: float, beta: float) -> np.ndarray:
    """Return the key tokens, bool [W, N], from the nll [W, N] in nats with the long and with the short context."""
    # float64, so that a difference of float32 values is not rounded again at the threshold.
    long_nll, short_nll = np.asarray(long_nll, dtype=np.float64), np.asarray(short_nll, dtype=np.float64)
    chosen: np.ndarray = (short_nll - long_nll > alpha) & (-long_nll > beta)
    # Their short context would be the long one, read at another t.
    chosen[:, :short_context] = False
    return chosen


def write(path: Path, keys: KeyTokens) -> None:
    """Write the list as JSON, creating parent folders."""
    make_folder(path.parent)
    write_atomically(path, json.dumps(asdict(keys), allow_nan=False) + "\n")


def read(path: Path) -> KeyTokens:
    """Read a list. Raises `ConfigError` for a file that is missing, damaged or of another format."""
    try:
        keys = decode(read_json(path, within=path.parent, most=LARGEST), KeyTokens, path)
        if keys.format != FORMAT or len(keys.positions) != keys.windows["count"]:
            raise ValueError(f"not a list of format {FORMAT}")
        # Positions beyond a window are an IndexError here, and not in the middle of an evaluation.
        keys.mask  # noqa: B018
    except (FileNotFoundError, BadFile, LookupError, TypeError, ValueError) as error:
        remedy = f"cannot be read as key tokens ({first_line(error)}); make it with data_prep.key_tokens"
        raise ConfigError("evaluation.key_tokens", path, remedy) from error
    return keys


def require_fit(keys: KeyTokens, path: str, windows: str, store: str) -> None:
    """Raise `ConfigError` for a list of other windows or another store, given by their fingerprints."""
    remedy = (
        "made for {what}; use the same store, longest length, num_windows, seed and bos, or make another with "
        "data_prep.key_tokens"
    )
    found = keys.store.get("fingerprint")
    require(found == store, "evaluation.key_tokens", path, remedy.format(what=f"another store ({found})"))
    found = keys.windows.get("fingerprint")
    require(found == windows, "evaluation.key_tokens", path, remedy.format(what=f"other windows ({found})"))
