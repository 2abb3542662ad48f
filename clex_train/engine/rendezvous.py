"""Rendezvous of the ranks of a launch on a free port, when the user named none.

DeepSpeed's launcher gives every job the same default port, so a second job on the machine would fail. When all ranks
are on one machine, rank 0 binds a free port and writes its number to a file named after the launcher's process; the
other ranks wait for that file. torchrun chooses a free port by itself.
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
"""Tolerance in seconds between two readings of the launcher's start time, in case the machine's clock is adjusted."""


def may_choose_port() -> bool:
    """Return True if all ranks were started on this machine by DeepSpeed's launcher with its default port."""
    # An explicit --master_port=29500 looks the same. On one machine nobody outside the launch needs the port, so
    # choosing another is harmless.
    alone = os.environ.get("CROSS_SIZE") == "1" and os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE")
    return alone and os.environ.get("MASTER_PORT") == DEEPSPEED_PORT and _launcher() is not None


def open_at_free_port(backend: str, timeout: timedelta) -> None:
    """Open the process group on a port that the kernel gives to rank 0, and export MASTER_ADDR and MASTER_PORT."""
    rank, count, note = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _note()
    if rank == 0:
        # Bind first, then publish: the port in the file is already ours.
        store = dist.TCPStore(HOST, 0, count, is_master=True, timeout=timeout, wait_for_workers=False)
        _write(note, store.port)
        # NCCL's init does not wait for the other ranks, which could then find the file removed.
        store.wait([_arrival(other) for other in range(1, count)], timeout)
        note.unlink(missing_ok=True)
    else:
        store = dist.TCPStore(HOST, _read(note, timeout), count, is_master=False, timeout=timeout)
        store.set(_arrival(rank), "")
    os.environ.update(MASTER_ADDR=HOST, MASTER_PORT=str(store.port))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)


def require_free_port() -> None:
    """Raise `ConfigError` on the listening rank when it cannot bind the named port.

    An invalid port number is refused on every rank.
    """
    # Under torchrun the agent listens, not rank 0, and its port is in use by design.
    listens = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ranks.require_port()
    port = os.environ.get("MASTER_PORT")
    if not listens or port is None:
        return
    # The same family as torch's TCPStore, or a port taken on IPv6 only would pass here and fail there.
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", int(port)), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "the port is in use by another program",
            errno.EACCES: "only root may use the port",
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
    """Find the process of DeepSpeed's launcher that started this rank, directly or through a wrapper."""
    try:
        return next((p for p in psutil.Process().parents() if LAUNCHER in p.cmdline()), None)
    except psutil.Error:
        return None


def _arrival(rank: int) -> str:
    """Return the store key that a rank sets once it is connected."""
    return f"clex_train/arrived/{rank}"


def _note() -> Path:
    """Return the path of this launch's port file."""
    # The host name separates containers that share /tmp but not their process ids.
    name = f"clex_train_port_{os.getuid()}_{socket.gethostname()}_{_require_launcher().pid}"
    return Path(tempfile.gettempdir()) / name


def _require_launcher() -> psutil.Process:
    launcher = _launcher()
    assert launcher is not None, "`may_choose_port` has found one"
    return launcher


def _write(note: Path, port: int) -> None:
    # Not `files.write_atomically`: in a world-writable /tmp the file must be created exclusively and private.
    partial = note.with_name(f"{note.name}.tmp")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{port} {_require_launcher().create_time()}")
    partial.replace(note)


def _read(note: Path, timeout: timedelta) -> int:
    """Wait for the port that rank 0 writes, and return it. Raises `RuntimeError` after `timeout`."""
    began, end = _require_launcher().create_time(), time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            port, launched = note.read_text(encoding="utf-8").split()
            # Ignore files of other users, and leftovers of a killed launch whose process id was reused.
            if note.stat().st_uid == os.getuid() and abs(float(launched) - began) < SAME_START:
                return int(port)
        time.sleep(0.05)
    raise RuntimeError(f"rank 0 opened no port within {timeout}; see its own output for the reason")
