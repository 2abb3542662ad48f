"""Rank variables that a launcher sets in the environment, validated strictly."""

import os

from clex_train.utils.bounds import MOST_RANKS
from clex_train.utils.errors import require, shortened

REMEDY = "a launcher such as torchrun or deepspeed sets it; start with one, or unset it"


def read_int(name: str, default: int, least: int = 0, most: int = MOST_RANKS) -> int:
    """Read the integer in an environment variable, `default` where it is not set; `ConfigError` for anything else."""
    text = os.environ.get(name, str(default))
    # `int` would also take " 1", "+1", "1_0" and digits of other scripts.
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    remedy = f"must be a number, at least {least}; {REMEDY}"
    require(digits and least <= int(text) <= most, name, shortened(text), remedy)
    return int(text)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; (0, 1) without a launcher.

    Raises:
        ConfigError: a variable is impossible, by name.
    """
    rank, ranks = read_int("RANK", 0), read_int("WORLD_SIZE", 1, least=1)
    # Some wrappers export WORLD_SIZE alone; every process would then train as rank 0 of 1.
    if "RANK" not in os.environ:
        require(ranks == 1, "WORLD_SIZE", ranks, f"RANK is not set; {REMEDY}")
        return rank, ranks
    require(rank < ranks, "RANK", rank, f"must be below WORLD_SIZE={os.environ.get('WORLD_SIZE', 1)}; {REMEDY}")
    local = read_int("LOCAL_RANK", 0)
    # Not every launcher sets LOCAL_WORLD_SIZE, so assume a single machine.
    together = read_int("LOCAL_WORLD_SIZE", ranks, least=1)
    require(together <= ranks, "LOCAL_WORLD_SIZE", together, f"must be at most WORLD_SIZE={ranks}; {REMEDY}")
    require(local < together, "LOCAL_RANK", local, f"must be below {_limit_of_local(together)}; {REMEDY}")
    require_port()
    return rank, ranks


def require_rendezvous() -> None:
    """Raise `ConfigError` where a rank lacks the number of ranks or the address where they meet."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        require(name in os.environ, name, None, f"not set, where RANK is; {REMEDY}")


def require_port() -> None:
    """Raise `ConfigError` for an invalid MASTER_PORT."""
    port = os.environ.get("MASTER_PORT")
    digits = port is None or (port.isascii() and port.isdecimal() and len(port) <= 5)
    require(
        digits and (port is None or 0 < int(port) < 2**16),
        "MASTER_PORT",
        shortened(str(port)),
        "must be a port number from 1 to 65535",
    )


def _limit_of_local(together: int) -> str:
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    return f"{name}={together}"
