"""Versions, devices, optional kernels and what is missing: `clex-train info`, to be pasted into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

import torch

from clex_train.console import program
from clex_train.tracking import summary
from clex_train.tracking.environment import git_commit
from clex_train.utils import locations, log, versions
from clex_train.utils.errors import ConfigError

TOOLS = {
    "g++": "compiles DeepSpeed's CPU Adam, which engine.offload needs",
    "sbatch": "submits jobs for clex-train slurm",
}


def main() -> None:
    """Print the report; takes no argument."""
    if sys.argv[1:]:
        raise ConfigError("argument", sys.argv[1], "clex-train info takes none")
    program.echo("\n".join(lines()))


def lines() -> Iterator[str]:
    """Yield one line a topic, the missing parts last."""
    commit = git_commit() or "not recorded"
    yield f"{versions.OWN} {versions.own()}, commit {commit}, in {locations.PACKAGE}"
    yield summary.labelled("python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}")
    yield summary.labelled("versions", ", ".join(_version(name) for name in versions.NEWEST_TESTED))
    yield summary.labelled("devices", _devices())
    found = [_version(name) for name in versions.OPTIONAL if name not in versions.missing()]
    yield summary.labelled("optional", ", ".join(found) or "none installed")
    for package in versions.missing():
        yield summary.labelled("missing", f"{package}: {versions.OPTIONAL[package].use}")
    for tool, use in TOOLS.items():
        if shutil.which(tool) is None:
            yield summary.labelled("missing", f"{tool}: {use}")
    for line in versions.untested_warnings():
        yield summary.labelled("untested", line)


def usage() -> str:
    """Return the text of `--help`."""
    return str(__doc__)


def _version(name: str) -> str:
    return f"{name} {versions.installed_version(name) or 'missing'}"


def _devices() -> str:
    """Name the GPUs and their memory, or the CPU and its cores."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus:
        named = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        return f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}, CUDA {torch.version.cuda}: {named}"
    build = (
        f"torch is built for CUDA {torch.version.cuda}, no GPU found" if torch.version.cuda else "a CPU build of torch"
    )
    # Count the cores that the scheduler allows this process, not those of the machine.
    return f"CPU, {len(os.sched_getaffinity(0))} cores ({build})"


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
