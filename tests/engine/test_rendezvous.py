"""Ranks meet beside another job: at a port of their own where none was named, else one line says that it is taken."""

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
def taken(port: int) -> Iterator[None]:
    """Somebody listens at the port and answers nobody, if nobody did before."""
    with socket.socket(socket.AF_INET6) as holder:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        with suppress(OSError):
            holder.bind(("::", port))
            holder.listen()
        yield


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """DeepSpeed's launcher with two ranks of the program."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    environment = environments.of_a_launch()
    return subprocess.run(
        [deepspeed, "--num_accelerators", "2", *words, PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


def test_a_launch_beside_another_job_at_deepspeeds_port_takes_one_of_its_own():
    with taken(int(rendezvous.DEEPSPEED_PORT)):
        done = launch()
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("met ")]
    first, second = line.split()[1:]
    assert first == second != rendezvous.DEEPSPEED_PORT
    assert not list(Path(tempfile.gettempdir()).glob(f"clex_train_port_{os.getuid()}_*.tmp"))


def _meet_without_waiting(rank: int, folder: str) -> None:
    """A rank under a backend whose group opens without waiting for the others, as NCCL's does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  registers the backend

    time.sleep(2.0 * rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", TMPDIR=folder)
    tempfile.tempdir = folder
    rendezvous._launcher = lambda: psutil.Process(os.getppid())
    rendezvous.open_at_free_port("fake", timedelta(seconds=60))
    Path(folder, f"met_{rank}").write_text(os.environ["MASTER_PORT"])
    torch.distributed.destroy_process_group()


def test_a_rank_that_comes_late_finds_the_port_whatever_the_backend_waits_for(tmp_path):
    call_on_two_ranks(_meet_without_waiting, str(tmp_path))
    first, second = ((tmp_path / f"met_{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert {path.name for path in tmp_path.iterdir()} == {"met_0", "met_1"}


def test_a_note_that_a_killed_launch_left_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rendezvous, "_launcher", psutil.Process)
    note = rendezvous._note()
    note.write_text(f"12345 {psutil.Process().create_time() - 60}")
    with pytest.raises(RuntimeError, match="rank 0 opened no port"):
        rendezvous._read(note, timedelta(seconds=0.2))
    rendezvous._write(note, 23456)
    assert rendezvous._read(note, timedelta(seconds=5)) == 23456


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_is_none_is_one_line(rank, port):
    rank(RANK="0", MASTER_PORT=port)
    with pytest.raises(ValueError, match=f"^MASTER_PORT={port}: must be a port number from 1 to 65535"):
        rendezvous.require_free_port()


def test_a_port_that_was_named_and_is_taken_is_one_line():
    port = free_port()
    with taken(int(port)):
        done = launch("--master_port", port)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "MASTER_PORT" in line or "Traceback" in line]
    assert ours == [
        f"error: MASTER_PORT={port}: the port is in use by another program; give another to the launcher, "
        "such as deepspeed --master_port=PORT or torchrun --master-port=PORT"
    ]


@pytest.fixture
def rank(monkeypatch):
    """Sets what a launcher tells a rank."""

    def put(**variables: str) -> None:
        for name in (*GROUP, "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_only_the_rank_that_is_to_listen_asks_whether_it_can(rank):
    port = free_port()
    with taken(int(port)):
        rank(RANK="1", MASTER_PORT=port)
        rendezvous.require_free_port()
        rank(RANK="0", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")
        rendezvous.require_free_port()
        rank(RANK="0", MASTER_PORT=port)
        with pytest.raises(ValueError, match=f"MASTER_PORT={port}: the port is in use"):
            rendezvous.require_free_port()
    rendezvous.require_free_port()


def test_a_port_is_chosen_on_one_machine_for_the_default_alone(rank, monkeypatch):
    one = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1", "MASTER_PORT": "29500"}
    rank(**one)
    assert not rendezvous.may_choose_port(), "not a child of DeepSpeed's launcher"
    monkeypatch.setattr(rendezvous, "_launcher", object)
    assert rendezvous.may_choose_port()
    for other in ({"MASTER_PORT": "29501"}, {"CROSS_SIZE": "2", "WORLD_SIZE": "4"}):
        rank(**one | other)
        assert not rendezvous.may_choose_port()
