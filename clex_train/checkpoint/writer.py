"""Writing of one rank's checkpoint files, synchronously or in a background thread, hashed on the way.

DeepSpeed passes every file to `save` of its checkpoint engine, which is replaced by a `Writer`. `save` never raises:
DeepSpeed runs collectives between saves, and a rank that left early would hang the others. Errors are kept until
`wait`, after which all ranks agree on the outcome.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import psutil
import torch

from clex_train.checkpoint.hashing import HashingFile
from clex_train.utils import log
from clex_train.utils.errors import disk_error

logger = log.get(__name__)


@dataclass(frozen=True)
class Written:
    """Size in bytes and SHA-256 of a file on disk."""

    size: int
    sha256: str


class Writer(Protocol):
    """Saves files one by one; `wait` then returns them, and `done` is True if it would return at once."""

    ended: float
    """Time at which the last file was finished, from `time.perf_counter`."""

    def save(self, state: Any, path: str | Path) -> None: ...

    def done(self) -> bool: ...

    def wait(self) -> dict[str, Written]:
        """Return the files written since the last call, by name. Raises the first error (`OSError`, `RuntimeError`)."""
        ...


class DirectWriter:
    """Writes each file before `save` returns."""

    def __init__(self) -> None:
        self.ended = 0.0
        self._written: dict[str, Written] = {}
        self._error: Exception | None = None

    def save(self, state: Any, path: str | Path) -> None:
        # After one failure the checkpoint is lost, and further writes would only take longer to fail.
        if self._error is None:
            try:
                self._written[Path(path).name] = write(state, Path(path))
            except (OSError, RuntimeError) as error:
                self._error = error
            self.ended = time.perf_counter()

    def done(self) -> bool:
        return True

    def wait(self) -> dict[str, Written]:
        written, error = self._written, self._error
        self._written, self._error = {}, None
        if error is not None:
            raise error
        return written


class BackgroundWriter:
    """Copies the state to host memory and writes the copy in a thread; without room for a copy, writes directly.

    DeepSpeed's decoupled engine writes from the memory that the optimizer updates next, so it must end before the next
    step. A copy has no such deadline.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        # One thread: parallel writes of one rank would only compete for the same disk.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._futures: list[Future[tuple[str, Written]]] = []
        self._direct = DirectWriter()

    def save(self, state: Any, path: str | Path) -> None:
        if not _fits(state):
            logger.warning("checkpoint %s: no host memory for a copy; training waits until it is written", path)
            self._direct.save(state, path)
            self.ended = self._direct.ended
            return
        self._futures.append(self._thread.submit(self._write, snapshot(state), Path(path)))

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def _write(self, state: Any, path: Path) -> tuple[str, Written]:
        try:
            return path.name, write(state, path)
        finally:
            self.ended = time.perf_counter()

    def wait(self) -> dict[str, Written]:
        futures, self._futures = self._futures, []
        # `exception` waits for the future. Wait for all of them before raising, or a thread would still be writing
        # into a folder that is about to be removed.
        errors = [error for future in futures if (error := future.exception()) is not None]
        written = self._direct.wait()
        if errors:
            raise errors[0]
        return written | dict(future.result() for future in futures)


@contextmanager
def writing_with(engine: Any, writer: Writer) -> Iterator[None]:
    """Make DeepSpeed's `engine` write its files through `writer` only."""
    checkpoint_engine = engine.checkpoint_engine
    checkpoint_engine.save = lambda state_dict, path: writer.save(state_dict, path)
    # Rank 0 copies zero_to_fp32.py between collectives; on a full disk that raises there and hangs the other ranks.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        del checkpoint_engine.save, engine._copy_recovery_script


def write(state: Any, path: Path) -> Written:
    """Write `state` with `torch.save`, hash it on the way and fsync. Raises `OSError` or `RuntimeError`."""
    with path.open("wb", buffering=0) as raw:
        file = HashingFile(raw)
        try:
            torch.save(state, cast(IO[bytes], file))
        except RuntimeError as error:
            # torch replaces the disk's OSError by a RuntimeError of its own when it closes the archive.
            if (cause := disk_error(error)) is not None:
                raise cause from None
            raise
        os.fsync(raw.fileno())
    return Written(file.size, file.hexdigest())


def snapshot(state: Any) -> Any:
    """Copy dicts, lists and tuples of tensors to host memory; tensors that share storage share it in the copy."""
    # ZeRO's state holds many views of a few flat buffers; `torch.save` writes a shared storage once.
    return _map_tensors(state, _Copies())


class _Copies:
    """Copies a tensor to the host, with one copy per storage."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach().untyped_storage()
        # The Python object of a storage is made on every access; `_cdata` is the address of the C++ one.
        copied = self._storages.get(source._cdata)
        if copied is None:
            # `cpu()` returns the storage itself when it is on the host, and the optimizer would change it.
            copied = source.clone() if source.device.type == "cpu" else source.cpu()
            self._storages[source._cdata] = copied
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(copied, tensor.storage_offset(), tensor.size(), tensor.stride())


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        # `copy` keeps the class, such as OrderedDict, and the order of the keys.
        mapped = copy.copy(value)
        mapped.update({key: _map_tensors(item, function) for key, item in value.items()})
        return mapped
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value if isinstance(value, torch.Size) else copy.deepcopy(value)


def _fits(state: Any) -> bool:
    """Return True if host memory has room for a copy on every rank of this node, assuming equal sizes."""
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    _map_tensors(state, count)
    # All ranks of a node read `available` before any has copied, so each counts for all. 10 % stays for page cache.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available: int = psutil.virtual_memory().available
    return sum(sizes.values()) * ranks < 0.9 * available
