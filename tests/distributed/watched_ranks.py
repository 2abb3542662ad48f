"""Two gloo ranks under a watchdog, one of which misbehaves; `watched_ranks.py FAULT RANK TIMEOUT`."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clex_train.resilience.watchdog import watching
from clex_train.utils import distributed
from clex_train.utils.errors import RankLost


def stuck_in_its_own_work() -> None:
    """As a read from a file system that does not answer; the process lives and beats."""
    time.sleep(600)


def stopped() -> None:
    """As a frozen node."""
    os.kill(os.getpid(), signal.SIGSTOP)


def killed() -> None:
    """As by the kernel when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(fault: str, rank: int, timeout: float) -> int:
    """Rank `rank` does what its fault says, the other one waits for it in a barrier."""
    # Two processes take as long to start as a busy machine makes them; what is timed begins when both are there.
    place, number = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), int(os.environ["RANK"])
    store = dist.TCPStore(*place, 2, is_master=number == 0, timeout=timedelta(seconds=240))
    dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=timeout))
    try:
        with watching(timeout):
            if distributed.rank() == rank:
                print("now", flush=True)
                {"stuck": stuck_in_its_own_work, "stopped": stopped, "killed": killed, "none": lambda: None}[fault]()
            distributed.barrier()
    except RankLost as error:
        print(f"LOST {error}", file=sys.stderr, flush=True)
        # The launcher, which would end the group with it, is not to be faster than what is tested.
        threading.Event().wait(0.1)
        os._exit(RankLost.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
