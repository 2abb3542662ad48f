"""What a launcher says of ranks in the environment, read strictly: a number that is none is the user's to mend."""

import os

from clex_train.utils.bounds import MOST_RANKS, require, shortened

REMEDY = "it is for a launcher to set, such as torchrun or deepspeed; start by one, or unset it"


def read_int(name: str, default: int, least: int = 0, most: int = MOST_RANKS) -> int:
    """Return the number in a variable, `default` where it is not set; `ValueError` if it is none."""
    text = os.environ.get(name, str(default))
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
    remedy = f"should be a number from {least}; {REMEDY}"
    require(digits and least <= int(text) <= most, name, shortened(text), remedy)
    return int(text)


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and how many there are; `ValueError` names the variable that cannot be.

    A process that no launcher has started is rank 0 of 1.
    """
    rank, ranks = read_int("RANK", 0), read_int("WORLD_SIZE", 1, least=1)
    if "RANK" not in os.environ:
        require(ranks == 1, "WORLD_SIZE", ranks, f"RANK is not set; {REMEDY}")
        return rank, ranks
    require(rank < ranks, "RANK", rank, f"should be below WORLD_SIZE={os.environ.get('WORLD_SIZE', 1)}; {REMEDY}")
    local = read_int("LOCAL_RANK", 0)
    together = read_int("LOCAL_WORLD_SIZE", ranks, least=1)
    require(together <= ranks, "LOCAL_WORLD_SIZE", together, f"should be at most WORLD_SIZE={ranks}; {REMEDY}")
    require(local < together, "LOCAL_RANK", local, f"should be below {_limit_of_local(together)}; {REMEDY}")
    require_port()
    return rank, ranks


def require_rendezvous() -> None:
    """Raise `ValueError` where a rank is not told how many there are and where they meet."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        require(name in os.environ, name, None, f"not set, where RANK is; {REMEDY}")


def require_port() -> None:
    """Raise `ValueError` for a MASTER_PORT that is no port."""
    port = os.environ.get("MASTER_PORT")
    digits = port is None or (port.isascii() and port.isdecimal() and len(port) <= 5)
    require(
        digits and (port is None or 0 < int(port) < 2**16),
        "MASTER_PORT",
        shortened(str(port)),
        "a port is a number from 1 to 65535",
    )


def display_rank() -> int:
    """Return the rank for prefixes of lines and for what only one rank says: 0 where the variable is no number."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_RANKS)) else 0


def _limit_of_local(together: int) -> str:
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE"
    return f"{name}={together}"
