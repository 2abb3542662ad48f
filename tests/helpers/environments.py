"""The environment of programs that tests launch."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a process group that was opened in this process leaves in the environment."""


def of_a_launch(**variables: str) -> dict[str, str]:
    """Return this process's environment without what other tests have left, and `variables`.

    One thread a rank, since several launches share two cores. A process group and a wandb service of this process
    would be taken for those of the launch.
    """
    own = {name: text for name, text in os.environ.items() if name not in GROUP and not name.startswith("WANDB_")}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **variables}
