"""Rendezvous of the ranks of a launch, at a port of their own where none was named.

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

from clex_train.utils import ranks
from clex_train.utils.errors import ConfigError

DEEPSPEED_PORT = "29500"
LAUNCHER = "deepspeed.launcher.launch"
HOST = "127.0.0.1"
SAME_START = 2.0
"""Seconds by which two readings of the launcher's start may differ, should the machine's clock be set meanwhile."""


def may_choose_port() -> bool:
    """Return True if all ranks are children of DeepSpeed's launcher on this machine, at the port it gives by default.

    On one machine no port has to be agreed on with anybody else, so naming the default is as good as naming none.
    """
    alone = os.environ.get("CROSS_SIZE") == "1" and os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE")
    return alone and os.environ.get("MASTER_PORT") == DEEPSPEED_PORT and _launcher() is not None


def open_at_free_port(backend: str, timeout: timedelta) -> None:
    """Open the process group at a port that the kernel gives to rank 0, and set MASTER_ADDR and MASTER_PORT to it."""
    rank, count, note = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _note()
    if rank == 0:
        store = dist.TCPStore(HOST, 0, count, is_master=True, timeout=timeout, wait_for_workers=False)
        _write(note, store.port)
        # NCCL's group opens without waiting for the others, who could then find the file gone.
        store.wait([_arrival(other) for other in range(1, count)], timeout)
        note.unlink(missing_ok=True)
    else:
        store = dist.TCPStore(HOST, _read(note, timeout), count, is_master=False, timeout=timeout)
        store.set(_arrival(rank), "")
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(store.port))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)


def require_free_port() -> None:
    """Refuse a port that the rank which listens cannot have: `ValueError` in one line, on that rank alone.

    What is no port at all is refused on every rank.
    """
    listens = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ranks.require_port()
    port = os.environ.get("MASTER_PORT")
    if not listens or port is None:
        return
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "the port is in use by another program",
            errno.EACCES: "the port is for root alone",
        }
        if error.errno not in reasons:
            raise
        raise ConfigError(
            "MASTER_PORT",
            port,
            f"{reasons[error.errno]}; give another to the launcher, "
            "such as deepspeed --master_port=PORT or torchrun --master-port=PORT",
        ) from error


def _launcher() -> psutil.Process | None:
    """The process of DeepSpeed's launcher that started this rank, directly or through a wrapper."""
    try:
        return next((p for p in psutil.Process().parents() if LAUNCHER in p.cmdline()), None)
    except psutil.Error:
        return None


def _arrival(rank: int) -> str:
    """Return the key by which a rank says that it has found the store."""
    return f"clex_train/arrived/{rank}"


def _note() -> Path:
    """Return the file of this launch; containers that share a folder of temporary files differ by their host's name."""
    name = f"clex_train_port_{os.getuid()}_{socket.gethostname()}_{_require_launcher().pid}"
    return Path(tempfile.gettempdir()) / name


def _require_launcher() -> psutil.Process:
    launcher = _launcher()
    assert launcher is not None, "`may_choose_port` has found one"
    return launcher


def _write(note: Path, port: int) -> None:
    beside = note.with_name(f"{note.name}.tmp")
    beside.unlink(missing_ok=True)
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{port} {_require_launcher().create_time()}")
    beside.replace(note)


def _read(note: Path, timeout: timedelta) -> int:
    """Wait for the port that rank 0 writes, and return it.

    A file of another user's is not taken for it, nor one that a killed launch of the same process id has left.
    """
    began, end = _require_launcher().create_time(), time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            port, launched = note.read_text(encoding="utf-8").split()
            if note.stat().st_uid == os.getuid() and abs(float(launched) - began) < SAME_START:
                return int(port)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 has opened no port within {timeout}; its own output says why")
