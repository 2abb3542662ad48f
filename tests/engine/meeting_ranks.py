"""Open a process group and exchange the ports of all ranks.

The program ends while collectives are still running, as training may: its exit code must be 0 all the same.
"""

import os
import sys

import torch

from clex_train.config.engine import EngineConfig
from clex_train.console import program
from clex_train.engine.deepspeed import open_process_group
from clex_train.utils import distributed


def main() -> None:
    """Print the port of every rank, by rank 0."""
    open_process_group(EngineConfig())
    ports = distributed.gather_objects(os.environ["MASTER_PORT"])
    if distributed.is_main():
        print("met", *ports, flush=True)
    for _ in range(200):
        torch.distributed.all_reduce(torch.ones(20), async_op=True)


if __name__ == "__main__":
    sys.exit(program.run(main, str))
