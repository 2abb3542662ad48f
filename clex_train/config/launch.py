"""Where and how `python -m launch.slurm` runs the training; train.py itself reads none of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum

from clex_train.utils.bounds import MOST_RANKS, require, require_at_most


class Layout(Enum):
    task_per_node = "task_per_node"
    task_per_rank = "task_per_rank"


class Launcher(Enum):
    torchrun = "torchrun"
    deepspeed = "deepspeed"


class Container(Enum):
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
"""Bounds of numbers that nobody can mean to exceed."""


@dataclass
class LaunchConfig:
    nodes: int = 1
    """Nodes of the job."""
    gpus_per_node: int = 8
    """GPUs of each node; 0 asks for none and trains on the CPU."""
    ranks_per_node: int | None = None
    """Training processes on each node; by default one for each GPU."""
    cpus_per_rank: int | None = None
    """CPU cores of each rank, also its OMP_NUM_THREADS; by default what the site gives."""
    memory: str | None = None
    """Host memory of each node in SLURM's notation, such as `512G`; `0` is all of it."""
    exclusive: bool = False
    """Share no node with another job."""
    time: str = "24:00:00"
    """Limit of one life of the job: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. In a YAML file in quotes."""
    signal_before: int = 300
    """Seconds before the limit at which the run saves a checkpoint and the job goes back into the queue."""
    linger: int = 600
    """Seconds that srun may wait for the other ranks after the first one has ended; then the job goes on without it."""
    max_restarts: int = 20
    """How often the job may go back into the queue, for its limit, preemption, a crash or a dead node."""
    layout: Layout = Layout.task_per_node
    """`task_per_node`: `launch.launcher` starts the ranks of a node; `task_per_rank`: srun starts each."""
    launcher: Launcher = Launcher.torchrun
    """What starts the ranks of a node when `launch.layout=task_per_node`."""
    partition: str | None = None
    """`sbatch --partition`; several are separated by commas."""
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
    """Lines of bash run before the training, after the modules. The only values that a shell executes."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job, such as `{NCCL_DEBUG: INFO}`."""
    network_interface: str | None = None
    """Network interface of NCCL's and gloo's connections, such as `ib0`; by default they choose."""
    container: Container = Container.none
    """What runs `launch.container_image`: the `pyxis` plug-in of srun, or `apptainer` within each task."""
    container_image: str | None = None
    """Image that has the requirements; the code comes from the snapshot."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to see in the container beside the run's own and the current one, as FOLDER or HOST:INSIDE."""
    python: str | None = None
    """Interpreter on the nodes; by default the one that submits, in a container its `python3`."""

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
        limit = seconds(self.time)
        require(
            1 <= self.signal_before <= 65535,
            "launch.signal_before",
            self.signal_before,
            "seconds, from 1 to 65535 (what SLURM counts to)",
        )
        require(
            self.signal_before < limit,
            "launch.signal_before",
            self.signal_before,
            f"must leave time to train: launch.time={self.time} is {limit} s",
        )
        require(
            self.container is Container.none or bool(self.container_image),
            "launch.container_image",
            self.container_image,
            f"launch.container={self.container.name} needs an image",
        )
        require(
            self.container is not Container.none or self.container_image is None,
            "launch.container",
            self.container.name,
            "choose pyxis or apptainer to run launch.container_image",
        )
        self._check_texts()

    @property
    def ranks(self) -> int:
        """Training processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def _check_texts(self) -> None:
        """Values stand in lines of the job script: none may end its line, and options must be options."""
        for item in fields(self):
            value = getattr(self, item.name)
            texts = (
                value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
            )
            for text in texts:
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
    """Seconds of a SLURM time limit; `ValueError` when it is not in one of SLURM's forms, or is nought."""
    parts = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", time)
    require(parts is not None, "launch.time", time, "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    assert parts is not None
    days, *rest = (int(part) if part is not None else None for part in parts.groups())
    numbers = [number for number in rest if number is not None]
    # With days the first number is hours, with two numbers or fewer and no days it is minutes.
    scale = [3600, 60, 1] if days is not None or len(numbers) == 3 else [60, 1]
    total = (days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, scale, strict=False))
    require(total > 0, "launch.time", time, "longer than nothing")
    return total
