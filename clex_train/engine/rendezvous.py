"""Where the ranks of a launch meet: a port of their own where none was named.

DeepSpeed's launcher gives every job the same default port, so that a second job on the machine would die. Where all
ranks are on one machine, rank 0 takes any free port and leaves its number in a file that is named after the launcher's
process; the others wait for that file. torchrun finds a free port by itself, and its ranks meet at the agent's store.
"""

import errno
import os
import socket
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

DEEPSPEED_PORT = "29500"
LAUNCHER = "deepspeed.launcher.launch"
HOST = "127.0.0.1"
CLOCK_SLACK = 5.0
"""Seconds by which the clocks of files and of processes may differ."""


def may_choose_port() -> bool:
    """Whether all ranks are children of DeepSpeed's launcher on this machine, at the port that it gives by default.

    On one machine no port has to be agreed on with anybody else, so naming the default is as good as naming none.
    """
    alone = os.environ.get("CROSS_SIZE") == "1" and os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE")
    return alone and os.environ.get("MASTER_PORT") == DEEPSPEED_PORT and _launcher() is not None


def open_at_free_port(backend: str, timeout: timedelta) -> None:
    """Open the process group at a port that the kernel gives to rank 0, and set MASTER_ADDR and MASTER_PORT to it."""
    rank, ranks, note = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _note()
    if rank == 0:
        store = dist.TCPStore(HOST, 0, ranks, is_master=True, timeout=timeout, wait_for_workers=False)
        _write(note, store.port)
    else:
        store = dist.TCPStore(HOST, _read(note, timeout), ranks, is_master=False, timeout=timeout)
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(store.port))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    if rank == 0:
        # Every rank has met here, so all have read it.
        note.unlink(missing_ok=True)


def require_free_port() -> None:
    """`ValueError` on the rank that is to listen if somebody else listens at the port already."""
    listens = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    port = os.environ.get("MASTER_PORT", "")
    if not (listens and port.isdecimal()):
        return
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ValueError(
            f"MASTER_PORT={port}: the port is in use by another program; give another to the launcher, "
            "such as deepspeed --master_port=PORT or torchrun --master-port=PORT"
        ) from error


def _launcher() -> psutil.Process | None:
    """The process of DeepSpeed's launcher that started this rank, directly or through a wrapper."""
    try:
        return next((p for p in psutil.Process().parents() if LAUNCHER in p.cmdline()), None)
    except psutil.Error:
        return None


def _note() -> Path:
    """The file of this launch."""
    launcher = _launcher()
    assert launcher is not None, "asked for by `may_choose_port`"
    return Path(tempfile.gettempdir()) / f"clex_train_port_{os.getuid()}_{launcher.pid}"


def _write(note: Path, port: int) -> None:
    beside = note.with_suffix(".tmp")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(str(port))
    beside.replace(note)


def _read(note: Path, timeout: timedelta) -> int:
    """The port that rank 0 writes; waits for it.

    A file of another user's is not taken for it, nor one that a killed launch of the same process id has left.
    """
    launcher, end = _launcher(), time.monotonic() + timeout.total_seconds()
    since = launcher.create_time() - CLOCK_SLACK if launcher else 0.0
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            found = note.stat()
            if found.st_uid == os.getuid() and found.st_mtime >= since:
                return int(note.read_text(encoding="utf-8"))
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 has opened no port within {timeout}; its own output says why")
