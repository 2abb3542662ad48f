"""The rendezvous port: a free one by default, and a one-line error if the given one is in use."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from clex_train.engine import rendezvous
from tests.helpers import environments
from tests.helpers.ports import free_port
from tests.helpers.warm_processes import call_on_two_ranks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(Path(__file__).with_name("meeting_ranks.py"))
GROUP = (*environments.GROUP, "CROSS_SIZE", "LOCAL_SIZE")


@contextmanager
def occupied_port(port: int) -> Iterator[None]:
    """Listen at the port without answering, unless another program already does."""
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        with suppress(OSError):
            holder.bind(("::", port))
            holder.listen()
        yield


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Run two ranks of the program under DeepSpeed's launcher."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    environment = environments.launch_environment()
    return subprocess.run(
        [deepspeed, "--num_accelerators", "2", *words, PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


def test_a_launch_picks_another_port_if_deepspeeds_default_is_in_use():
    with occupied_port(int(rendezvous.DEEPSPEED_PORT)):
        done = launch()
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("met ")]
    first, second = line.split()[1:]
    assert first == second != rendezvous.DEEPSPEED_PORT
    assert not list(Path(tempfile.gettempdir()).glob(f"clex_train_port_{os.getuid()}_*.tmp"))


def _join_without_waiting(launcher_variables: int, folder: str) -> None:
    """Join under a backend whose group opens without waiting for other ranks, as NCCL's does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  registers the backend

    time.sleep(2.0 * launcher_variables)
    os.environ.update(RANK=str(launcher_variables), LOCAL_RANK=str(launcher_variables), WORLD_SIZE="2", TMPDIR=folder)
    tempfile.tempdir = folder
    rendezvous._launcher = lambda: psutil.Process(os.getppid())
    rendezvous.open_at_free_port("fake", timedelta(seconds=60))
    Path(folder, f"met_{launcher_variables}").write_text(os.environ["MASTER_PORT"])
    torch.distributed.destroy_process_group()


def test_a_late_rank_finds_the_port_even_if_the_backend_does_not_wait(tmp_path):
    call_on_two_ranks(_join_without_waiting, str(tmp_path))
    first, second = ((tmp_path / f"met_{launcher_variables}").read_text() for launcher_variables in (0, 1))
    assert first == second
    assert {path.name for path in tmp_path.iterdir()} == {"met_0", "met_1"}


def test_a_stale_note_of_a_killed_launch_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rendezvous, "_launcher", psutil.Process)
    note = rendezvous._note()
    note.write_text(f"12345 {psutil.Process().create_time() - 60}")
    with pytest.raises(RuntimeError, match="rank 0 opened no port"):
        rendezvous._read(note, timedelta(seconds=0.2))
    rendezvous._write(note, 23456)
    assert rendezvous._read(note, timedelta(seconds=5)) == 23456


@pytest.mark.parametrize("port", ["0", "99999"])
def test_an_invalid_port_is_refused_in_one_line(launcher_variables, port):
    launcher_variables(RANK="0", MASTER_PORT=port)
    with pytest.raises(ValueError, match=f"^MASTER_PORT={port}: must be a port number from 1 to 65535"):
        rendezvous.require_free_port()


def test_a_given_port_in_use_is_refused_in_one_line():
    port = free_port()
    with occupied_port(int(port)):
        done = launch("--master_port", port)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "MASTER_PORT" in line or "Traceback" in line]
    assert ours == [
        f"error: MASTER_PORT={port}: the port is in use by another program; give another to the launcher, "
        "such as deepspeed --master_port=PORT or torchrun --master-port=PORT"
    ]


@pytest.fixture
def launcher_variables(monkeypatch):
    """Return a function that sets the variables that a launcher gives to a rank."""

    def set_variables(**variables: str) -> None:
        for name in (*GROUP, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_only_the_listening_rank_checks_the_port(launcher_variables):
    port = free_port()
    with occupied_port(int(port)):
        launcher_variables(RANK="1", MASTER_PORT=port)
        rendezvous.require_free_port()
        launcher_variables(RANK="0", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
        rendezvous.require_free_port()
        launcher_variables(RANK="0", MASTER_PORT=port)
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}: the port is in use"):
            rendezvous.require_free_port()
    rendezvous.require_free_port()


def test_a_port_is_only_chosen_on_one_machine_in_place_of_the_default(launcher_variables, monkeypatch):
    one = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1", "MASTER_PORT": "29500"}
    launcher_variables(**one)
    assert not rendezvous.may_choose_port(), "not a child of DeepSpeed's launcher"
    monkeypatch.setattr(rendezvous, "_launcher", object)
    assert rendezvous.may_choose_port()
    for other in ({"MASTER_PORT": "29501"}, {"CROSS_SIZE": "2", "WORLD_SIZE": "4"}):
        launcher_variables(**one | other)
        assert not rendezvous.may_choose_port()
