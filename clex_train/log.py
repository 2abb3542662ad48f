"""Logging for programs of many ranks: rank 0 speaks at INFO, the others from WARNING on, each line with its rank."""

import logging
import os
import sys
import warnings


def setup() -> None:
    """Configure the root logger of an entry point once; library chatter below WARNING is silenced."""
    rank = int(os.environ.get("RANK", "0"))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {f'[rank {rank}] ' if rank else ''}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("clex_train", "data_prep", "launch"):
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    # DeepSpeed calls collectives by names that newer torch has renamed; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b")


def get(name: str) -> logging.Logger:
    """The logger of a module; `name` is its `__name__`."""
    return logging.getLogger(name)
