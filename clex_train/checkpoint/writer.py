"""Writes a rank's files of a checkpoint, at once or in a thread beside training, and hashes them on their way.

DeepSpeed hands every file to the `save` of its checkpoint engine. Ours never fails inside DeepSpeed's collectives: what
goes wrong is kept and reported by `wait`, where all ranks can agree on it. DeepSpeed's own decoupled engine writes in
another process from the very memory that the optimizer changes next, so it has to be done by the next optimizer step,
and its files cannot be read back safely; a copy in host memory may take as long as it likes.
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
    """A file that lies on disk: its size in bytes and its SHA-256."""

    size: int
    sha256: str


class Writer(Protocol):
    """`save` every file, then `wait`; `done` tells whether `wait` would return at once."""

    ended: float
    """When the last file was finished, on the clock of `time.perf_counter`."""

    def save(self, state: Any, path: str | Path) -> None: ...

    def done(self) -> bool: ...

    def wait(self) -> dict[str, Written]:
        """What was written, by name, and forget it. Raises the first error (`OSError`, `RuntimeError`)."""
        ...


class DirectWriter:
    """Writes each file before `save` returns."""

    def __init__(self) -> None:
        self.ended = 0.0
        self._written: dict[str, Written] = {}
        self._error: Exception | None = None

    def save(self, state: Any, path: str | Path) -> None:
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
    """Copies the state to host memory and writes it in a thread; directly, and saying so, if it does not fit there."""

    def __init__(self) -> None:
        self.ended = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._futures: list[Future[tuple[str, Written]]] = []
        self._direct = DirectWriter()

    def save(self, state: Any, path: str | Path) -> None:
        if not _fits(state):
            logger.warning("checkpoint %s: no host memory for a copy; it is written before training goes on", path)
            self._direct.save(state, path)
            self.ended = self._direct.ended
            return
        self._futures.append(self._thread.submit(self._write, snapshot(state), Path(path)))

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def _write(self, held: Any, path: Path) -> tuple[str, Written]:
        try:
            return path.name, write(held, path)
        finally:
            self.ended = time.perf_counter()

    def wait(self) -> dict[str, Written]:
        futures, self._futures = self._futures, []
        errors = [error for future in futures if (error := future.exception()) is not None]
        written = self._direct.wait()
        if errors:
            raise errors[0]
        return written | dict(future.result() for future in futures)


@contextmanager
def writing_with(engine: Any, writer: Writer) -> Iterator[None]:
    """Within, DeepSpeed's `engine` writes its files through `writer` and nothing else."""
    checkpoint_engine = engine.checkpoint_engine
    checkpoint_engine.save = lambda state_dict, path: writer.save(state_dict, path)
    # These scripts lie in DeepSpeed's package; on a full disk, copying them would strand rank 0 in a collective.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        del checkpoint_engine.save, engine._copy_recovery_script


def write(state: Any, path: Path) -> Written:
    """Write by `torch.save`, hash on the way and flush to the disk. `OSError` or `RuntimeError` if it fails."""
    with path.open("wb", buffering=0) as raw:
        file = HashingFile(raw)
        try:
            torch.save(state, cast(IO[bytes], file))
        except RuntimeError as error:
            # torch wraps what the file said when it closes the archive.
            if (cause := disk_error(error)) is not None:
                raise cause from None
            raise
        os.fsync(raw.fileno())
    return Written(file.size, file.hexdigest())


def snapshot(state: Any) -> Any:
    """A copy in host memory of dicts, lists and tuples of tensors; tensors that share memory share it in the copy."""
    return _map_tensors(state, _Copies())


class _Copies:
    """Copies of storages: the same one for every tensor that looks at it."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.detach().untyped_storage()
        held = self._storages.get(source._cdata)
        if held is None:
            held = source.clone() if source.device.type == "cpu" else source.cpu()
            self._storages[source._cdata] = held
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(held, tensor.storage_offset(), tensor.size(), tensor.stride())


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        mapped.update({key: _map_tensors(item, function) for key, item in value.items()})
        return mapped
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return value if isinstance(value, torch.Size) else copy.deepcopy(value)


def _fits(state: Any) -> bool:
    """Whether host memory has room for a copy, if every rank of this node makes one of the same size."""
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    _map_tensors(state, count)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available: int = psutil.virtual_memory().available
    return sum(sizes.values()) * ranks < 0.9 * available
