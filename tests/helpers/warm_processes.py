"""Quickly started processes, forked from one that has done the imports that take a fresh interpreter ten seconds.

A program gets its own arguments, environment, folder and output, as from a shell. There is one process to fork from for
each process of pytest, without GPUs, since CUDA does not survive a fork. The start-up of launchers and of the
interpreter is not covered by such processes.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.helpers import environments
from tests.helpers.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    "torch",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "train",
    "clex_train.training.loop",
    "clex_train.checkpoint.store",
    "clex_train.measures.during_training",
    "clex_train.engine.deepspeed",
    # Imports torch's compiler, as DeepSpeed does when it builds any optimizer.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "data_prep.tokenize.run",
]


class Program:
    """A process that runs a script with arguments, or `-m` and a module, as they would follow `python`."""

    def __init__(self, command: list[str], folder: Path = ROOT, **variables: str) -> None:
        self.command = command
        self._outputs = tempfile.TemporaryDirectory()
        self.outputs = [Path(self._outputs.name, name) for name in ("stdout", "stderr")]
        for output in self.outputs:
            output.touch()
        arguments = (command, folder, environments.launch_environment(**variables), self.outputs)
        self.process: Any = _context().Process(target=_program, args=arguments)
        self.process.start()

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def stdout(self) -> str:
        """Return the contents of stdout so far."""
        return self.outputs[0].read_text()

    def end(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the process, as `subprocess.run` does."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.command, timeout, *(file.read_text() for file in self.outputs))
        return subprocess.CompletedProcess(
            self.command, self.process.exitcode, *(file.read_text() for file in self.outputs)
        )


def run_ranks(count: int, command: list[str], timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the program on `count` gloo ranks to the end; as with a launcher, the first failure ends the others."""
    port = free_port()
    ranks = [Program(command, **rank_variables(rank, count, port)) for rank in range(count)]
    stop = time.monotonic() + timeout
    while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < stop:
        if any(rank.process.exitcode for rank in ranks):
            break
        ranks[0].process.join(0.05)
    failed = [rank for rank in ranks if rank.process.exitcode]
    for rank in ranks:
        rank.kill()
    return (failed or ranks)[0].end()


def rank_variables(rank: int, count: int, port: str) -> dict[str, str]:
    """Return the variables that a launcher gives to a rank."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def call_on_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in a process for each of two ranks; raise the first exception of one here."""
    _context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


@cache
def _context() -> Any:
    """Start the process from which all others are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        for name in environments.GROUP:
            patch.delenv(name, raising=False)
        forkserver.ensure_running()
    return context


def _program(command: list[str], folder: Path, variables: dict[str, str], outputs: list[Path]) -> None:
    """Replace this forked process by the program."""
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[:0] = [str(ROOT), str(Path(command[0]).absolute().parent)]
        runpy.run_path(command[0], run_name="__main__")
