"""The environment of programs that tests launch."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that opening a process group in this process sets."""


def launch_environment(**variables: str) -> dict[str, str]:
    """Return the environment of this process without leftovers of other tests, plus `variables`.

    Set one thread per rank, since several launches share two cores. Remove the process group and the wandb service of
    this process, which the launch would otherwise use.
    """
    own = {name: text for name, text in os.environ.items() if name not in GROUP and not name.startswith("WANDB_")}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **variables}
