"""Render a job script: sbatch directives, the run's settings as quoted bash, and the shell code of `launch/job/`.

#SBATCH --nodes=4                     values in double quotes if sbatch's parser needs them
run_dir='/data/it'"'"'s here'         values quoted by shlex, so that bash expands nothing
task() { ... }                        launch/job/<torchrun|deepspeed|task_per_rank>.sh
...                                   launch/job/signals.sh: one life of the job, the same for all launchers
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
from clex_train.utils.errors import require
from clex_train.utils.locations import ROOT
from launch.containers import entrance

NAME, CODE = "job.sh", "code"
MACHINERY = Path(__file__).parent / "job"

HYDRA = """\
# Written by python -m launch.slurm: the complete config of the job next to it.
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
    """Return the script of a submission in `folder` (absolute), to run with `submitted_from` as current directory."""
    launch = config.launch
    for path in (folder, submitted_from):
        # In the name of a log, sbatch reads a backslash as "do not replace %"; a newline would end the directive.
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
        (MACHINERY / "signals.sh").read_text(encoding="utf-8"),
    )
    return "\n".join(parts)


def configuration_text(config: Config, folder: Path) -> str:
    """Return `config.yaml` of a submission: the complete config, with a shipped architecture from the snapshot."""
    model = replace(config.model, config=_from_snapshot(config.model.config, folder))
    # Absolute, and without launch keys: the job may start in another directory, and must not submit itself.
    job = replace(config, model=model, output_dir=str(Path(config.output_dir).absolute()), launch=LaunchConfig())
    return HYDRA + run_folder.as_yaml(job)


def log_file(run_dir: Path) -> Path:
    """Return the single log of all lives and submissions of a run."""
    return run_dir.absolute() / "slurm.log"


def directives(config: Config, submitted_from: Path) -> Iterator[tuple[str, str | int | None]]:
    """Yield (option of sbatch, value); None means an option without a value."""
    launch, run_dir = config.launch, Path(config.output_dir).absolute()
    tasks = launch.ranks if launch.layout is Layout.task_per_rank else 1
    # The hash of the run folder: two runs of one name must not wait for each other.
    yield "job-name", f"{config.name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}"
    # Two jobs of one run folder would write the same checkpoints; singleton runs jobs of one name one at a time.
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
    # B: signals the batch script alone. Otherwise SLURM signals the steps, and their launchers die from it.
    yield "signal", f"B:USR1@{launch.signal_before}"
    yield "requeue", None
    # Each life would truncate the log by default.
    yield "open-mode", "append"
    yield "output", str(log_file(run_dir)).replace("%", "%%")
    yield "chdir", str(submitted_from)


def _directive(name: str, value: str | int | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={_for_sbatch(str(value))}"


def _option(written: str) -> str:
    """Turn a `--name=value` option of the user into a directive."""
    name, equals, value = written.removeprefix("--").partition("=")
    return _directive(name, value if equals else None)


def _for_sbatch(value: str) -> str:
    """Quote a value for sbatch's parser of directives: double quotes, with backslashes before quotes inside."""
    if value and all(c.isalnum() or c in "-_.,:;=@/+[]()&|*%" for c in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _from_snapshot(path: str | None, folder: Path) -> str | None:
    """Map a relative path within the repository, as in conf/model, to the snapshot of the repository."""
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
    """Yield the lines that a site needs: modules, environment variables and setup commands."""
    # Batch scripts run in a non-login shell, where `module` is often undefined.
    if launch.modules:
        yield "type module >/dev/null 2>&1 || source /etc/profile"
    for module in launch.modules:
        yield f"module load {shlex.quote(module)} || exit 2"
    variables = dict(launch.environment)
    if launch.network_interface:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            variables.setdefault(name, launch.network_interface)
    # One thread per rank is torch's default under torchrun; use the cores that the rank owns.
    if launch.cpus_per_rank:
        variables.setdefault("OMP_NUM_THREADS", str(launch.cpus_per_rank))
    if not launch.gpus_per_node:
        variables.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in variables.items():
        yield f"export {assignment(name, value)}"
    yield from launch.setup


def assignment(name: str, value: object) -> str:
    """Format `name=value` for bash, with any value."""
    return f"{name}={shlex.quote(str(value))}"


def array(name: str, values: Sequence[str]) -> str:
    """Format a bash array with any values."""
    return f"{name}=({' '.join(shlex.quote(value) for value in values)})"
