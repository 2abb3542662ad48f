"""Config group `launch`: resources and environment of `python -m launch.slurm`; train.py itself ignores it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum

from clex_train.utils.bounds import MOST_RANKS
from clex_train.utils.errors import require, require_at_most


class Layout(Enum):
    """Ways of placing ranks on the GPUs of a node."""

    task_per_node = "task_per_node"
    task_per_rank = "task_per_rank"


class Launcher(Enum):
    """Programs that start the ranks of a SLURM job."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"


class Container(Enum):
    """Container runtimes of a SLURM job."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


MOST = {
    "nodes": MOST_RANKS,
    "gpus_per_node": 1024,
    "ranks_per_node": 1024,
    "cpus_per_rank": 4096,
    "linger": 10**6,
    "max_restarts": 10**6,
}
"""Upper bounds that catch typing errors."""


@dataclass
class LaunchConfig:
    """The `launch` group: resources and environment of a SLURM job."""

    nodes: int = 1
    """Nodes of the job."""
    gpus_per_node: int = 8
    """GPUs of each node; 0: none, train on the CPU."""
    ranks_per_node: int | None = None
    """Training processes on each node; null: one per GPU."""
    cpus_per_rank: int | None = None
    """CPU cores of each rank, also its OMP_NUM_THREADS; null: the site's default."""
    memory: str | None = None
    """Host memory of each node in SLURM's notation, such as `512G`; `0` means all of it."""
    exclusive: bool = False
    """Share nodes with no other job."""
    time: str = "24:00:00"
    """Time limit of one life of the job: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS (quoted in YAML)."""
    signal_before: int = 300
    """Seconds before the limit at which the run saves a checkpoint and the job is requeued, 1 to 65535."""
    linger: int = 600
    """Seconds that srun may wait for other ranks after the first has ended, before the job continues without it."""
    max_restarts: int = 20
    """Maximum number of requeues, for the time limit, preemption, a crash or a dead node; 0: never."""
    layout: Layout = Layout.task_per_node
    """`task_per_node`: `launch.launcher` starts the ranks of a node; `task_per_rank`: srun starts each rank."""
    launcher: Launcher = Launcher.torchrun
    """Program that starts the ranks of a node with `launch.layout=task_per_node`."""
    partition: str | None = None
    """`sbatch --partition`; separate several by commas."""
    account: str | None = None
    """`sbatch --account`."""
    qos: str | None = None
    """`sbatch --qos`."""
    constraint: str | None = None
    """`sbatch --constraint`: features that the nodes must have."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, each as `--name` or `--name=value`."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of the srun that starts the training, each as `--name` or `--name=value`."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load, in order."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash to run before the training, after the modules; the only values that a shell executes."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, such as `{NCCL_DEBUG: INFO}`."""
    network_interface: str | None = None
    """Network interface for NCCL and gloo, such as `ib0`; null: they choose."""
    container: Container = Container.none
    """Runtime for `launch.container_image`: srun's `pyxis` plugin, or `apptainer` within each task."""
    container_image: str | None = None
    """Image with the requirements installed; the code comes from the snapshot."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to mount in addition to the run folder and the current one, as FOLDER or HOST:INSIDE."""
    python: str | None = None
    """Python interpreter on the nodes; null: the one that submits, or `python3` in a container."""

    def __post_init__(self) -> None:
        require_at_most(self, "launch.", MOST)
        require(self.nodes >= 1, "launch.nodes", self.nodes, "at least 1 node")
        require(self.gpus_per_node >= 0, "launch.gpus_per_node", self.gpus_per_node, "0 or a number of GPUs")
        require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            "launch.ranks_per_node",
            self.ranks_per_node,
            "at least 1 rank",
        )
        require(
            # DeepSpeed and NCCL need one GPU per rank; without GPUs any number of ranks is fine.
            self.ranks_per_node is None or self.gpus_per_node in (0, self.ranks_per_node),
            "launch.ranks_per_node",
            self.ranks_per_node,
            f"one rank for each of launch.gpus_per_node={self.gpus_per_node} GPUs; leave it null",
        )
        require(
            self.cpus_per_rank is None or self.cpus_per_rank >= 1,
            "launch.cpus_per_rank",
            self.cpus_per_rank,
            "at least 1 core",
        )
        require(self.linger >= 1, "launch.linger", self.linger, "at least 1 second")
        require(self.max_restarts >= 0, "launch.max_restarts", self.max_restarts, "0 (never) or a number")
        # Parsed here, so that a typo is found on the login node and not by sbatch.
        limit = seconds(self.time)
        require(
            1 <= self.signal_before <= 65535,
            "launch.signal_before",
            self.signal_before,
            "seconds, from 1 to 65535 (SLURM's maximum)",
        )
        require(
            # SLURM would send the signal at the start, and the job would be requeued forever.
            self.signal_before < limit,
            "launch.signal_before",
            self.signal_before,
            f"must leave time to train: launch.time={self.time} is {limit} s",
        )
        self._check_container()
        self._check_texts()

    @property
    def ranks(self) -> int:
        """Training processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def _check_container(self) -> None:
        require(
            self.container is Container.none or bool(self.container_image),
            "launch.container_image",
            self.container_image,
            f"launch.container={self.container.name} needs an image",
        )
        require(
            # An image without a runtime would be ignored, and the job would run on the host.
            self.container is not Container.none or self.container_image is None,
            "launch.container",
            self.container.name,
            "choose pyxis or apptainer to run launch.container_image",
        )

    def _check_texts(self) -> None:
        """Raise `ConfigError` for values that would end a line of the job script, and for malformed options."""
        for item in fields(self):
            value = getattr(self, item.name)
            texts = (
                value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
            )
            for text in texts:
                # A newline within a directive or assignment would let a value become a command.
                line = not isinstance(text, str) or text.isprintable()
                require(line, f"launch.{item.name}", repr(text), "one line of printable characters")
        for name in ("sbatch_options", "srun_options"):
            for option in getattr(self, name):
                written = re.fullmatch(r"--[a-zA-Z][\w-]*(=.*)?", option) is not None
                require(written, f"launch.{name}", option, "write each as --name or --name=value")
        for name in self.environment:
            known = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None
            require(known, "launch.environment", name, "not the name of an environment variable")


def seconds(time: str) -> int:
    """Convert a SLURM time limit to seconds; raise `ConfigError` if it has none of SLURM's forms or is zero."""
    parts = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time)
    require(parts is not None, "launch.time", time, "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    assert parts is not None
    # Missing parts are None, and 0 is a valid part.
    days, *rest = (int(part) if part is not None else None for part in parts.groups())
    numbers = [number for number in rest if number is not None]
    # With days the first number is hours; with one or two numbers and no days it is minutes.
    scale = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    total = (days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, scale, strict=False))
    require(total > 0, "launch.time", time, "longer than nothing")
    return total
