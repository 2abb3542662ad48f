"""Two gloo ranks under a watchdog, one with a fault: `watched_ranks.py FAULT RANK TIMEOUT`."""

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
    """Hang as in a read from an unresponsive file system; the process lives and sends heartbeats."""
    time.sleep(600)


def stopped() -> None:
    """Stop like a frozen node."""
    os.kill(os.getpid(), signal.SIGSTOP)


def killed() -> None:
    """Die as if killed by the kernel for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(fault: str, rank: int, timeout: float) -> int:
    """Run the fault on rank `rank` while the other rank waits in a barrier."""
    # Start timing when both ranks are up: a busy machine delays the start of processes.
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
        # Do not exit at once, or a launcher could end the other rank before the watchdog under test does.
        threading.Event().wait(0.1)
        os._exit(RankLost.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
