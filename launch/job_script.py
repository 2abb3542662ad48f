"""The text of a job: directives for sbatch, the run's settings as quoted bash, and the machinery of `launch/job/`.

#SBATCH --nodes=4                     values in double quotes where sbatch's parser needs them
run_dir='/data/it'"'"'s here'         values quoted by shlex, executed by nothing
task() { ... }                        launch/job/<torchrun|deepspeed|task_per_rank>.sh
...                                   launch/job/life.sh: one life of the job, the same for all
"""

import hashlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clex_train.config.launch import Container, LaunchConfig, Layout
from clex_train.config.root import Config
from clex_train.tracking import run_folder
from clex_train.utils.bounds import require
from clex_train.utils.locations import ROOT
from launch.containers import entrance

NAME, CODE = "job.sh", "code"
MACHINERY = Path(__file__).parent / "job"

HYDRA = """\
# Written by python -m launch.slurm: the whole configuration of the job beside it.
defaults:
  - schema
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  output_subdir: null
  run:
    dir: .
"""


def render(config: Config, folder: Path, submitted_from: Path) -> str:
    """The script of a submission in `folder` (absolute), to be run with `submitted_from` as its current directory."""
    launch = config.launch
    for path in (folder, submitted_from):
        # sbatch reads a backslash in the name of a log as "replace no %", and a newline ends a directive.
        require(
            str(path).isprintable() and "\\" not in str(path), "output_dir", repr(str(path)), "choose a plainer path"
        )
    require(config.name.isprintable(), "name", repr(config.name), "one line of printable characters")
    start = launch.layout.value if launch.layout is Layout.task_per_rank else launch.launcher.value
    parts = (
        "#!/bin/bash",
        f"# {config.name}: training job written by python -m launch.slurm. Submit again: sbatch {NAME}",
        *(_directive(name, value) for name, value in directives(config, submitted_from)),
        *map(_option, launch.sbatch_options),
        "",
        *_settings(config, folder, submitted_from),
        "",
        *_site(launch),
        "",
        (MACHINERY / f"{start}.sh").read_text(encoding="utf-8"),
        (MACHINERY / "life.sh").read_text(encoding="utf-8"),
    )
    return "\n".join(parts)


def configuration_text(config: Config, folder: Path) -> str:
    """`config.yaml` of a submission: what train.py composes, complete, its shipped architecture from the snapshot."""
    model = replace(config.model, config=_from_snapshot(config.model.config, folder))
    job = replace(config, model=model, output_dir=str(Path(config.output_dir).absolute()), launch=LaunchConfig())
    return HYDRA + run_folder.as_yaml(job)


def log_file(run_dir: Path) -> Path:
    """The one log of all lives and submissions of a run."""
    return run_dir.absolute() / "slurm.log"


def directives(config: Config, submitted_from: Path) -> Iterator[tuple[str, str | int | None]]:
    """(option of sbatch, value); None stands for an option without a value."""
    launch, run_dir = config.launch, Path(config.output_dir).absolute()
    tasks = launch.ranks if launch.layout is Layout.task_per_rank else 1
    yield "job-name", f"{config.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
    # Two jobs of one run folder would write the same checkpoints: of one name, one runs at a time.
    yield "dependency", "singleton"
    yield "nodes", launch.nodes
    yield "ntasks-per-node", tasks
    if launch.gpus_per_node:
        yield "gpus-per-node", launch.gpus_per_node
    if launch.cpus_per_rank:
        yield "cpus-per-task", launch.cpus_per_rank * launch.ranks // tasks
    if launch.exclusive:
        yield "exclusive", None
    for name, value in (
        ("mem", launch.memory),
        ("partition", launch.partition),
        ("account", launch.account),
        ("qos", launch.qos),
        ("constraint", launch.constraint),
    ):
        if value is not None:
            yield name, value
    yield "time", launch.time
    yield "signal", f"B:USR1@{launch.signal_before}"
    yield "requeue", None
    yield "open-mode", "append"
    yield "output", str(log_file(run_dir)).replace("%", "%%")
    yield "chdir", str(submitted_from)


def _directive(name: str, value: str | int | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={_for_sbatch(str(value))}"


def _option(written: str) -> str:
    """A `--name=value` of the user's own as a directive."""
    name, equals, value = written.removeprefix("--").partition("=")
    return _directive(name, value if equals else None)


def _for_sbatch(value: str) -> str:
    """A value as sbatch's parser of directives takes it: double quotes, and backslashes before those inside."""
    if value and all(c.isalnum() or c in "-_.,:;=@/+[]()&|*%" for c in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _from_snapshot(path: str | None, folder: Path) -> str | None:
    """A relative path below the repository, as conf/model has them, in the copy of the repository."""
    if path is None or Path(path).is_absolute() or not (ROOT / path).is_dir():
        return path
    return str(folder / CODE / path)


def _settings(config: Config, folder: Path, submitted_from: Path) -> Iterator[str]:
    launch, run_dir = config.launch, Path(config.output_dir).absolute()
    inside = launch.container is not Container.none
    way_in = entrance(launch, [submitted_from, run_dir])
    yield assignment("run_dir", run_dir)
    yield assignment("submission", folder)
    yield assignment("python", launch.python or ("python3" if inside else sys.executable))
    yield assignment("ranks_per_node", launch.ranks)
    yield assignment("max_restarts", launch.max_restarts)
    yield assignment("linger", launch.linger)
    yield array("arguments", [f"--config-path={folder}", "--config-name=config"])
    yield array("srun_options", [*way_in.srun_options, *launch.srun_options])
    yield array("prefix", way_in.prefix)


def _site(launch: LaunchConfig) -> Iterator[str]:
    """What the site asks for: modules, variables, lines of its own."""
    if launch.modules:
        yield "type module >/dev/null 2>&1 || source /etc/profile"
    for module in launch.modules:
        yield f"module load {shlex.quote(module)} || exit 2"
    variables = dict(launch.environment)
    if launch.network_interface:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            variables.setdefault(name, launch.network_interface)
    if launch.cpus_per_rank:
        variables.setdefault("OMP_NUM_THREADS", str(launch.cpus_per_rank))
    if not launch.gpus_per_node:
        variables.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in variables.items():
        yield f"export {assignment(name, value)}"
    yield from launch.setup


def assignment(name: str, value: object) -> str:
    """`name=value` in bash, whatever the value holds."""
    return f"{name}={shlex.quote(str(value))}"


def array(name: str, values: Sequence[str]) -> str:
    """An array in bash, whatever its values hold."""
    return f"{name}=({' '.join(shlex.quote(value) for value in values)})"
