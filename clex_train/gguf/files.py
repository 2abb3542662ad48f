"""GGUF files: written under another name and renamed when complete, read with any damage in one line.

The `gguf` package belongs to the extra `export` and is imported on first use. Nothing is written before the free space
of the disk was compared with the size of the file.
"""

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clex_train.utils import versions
from clex_train.utils.errors import ConfigError, first_line, no_room, require
from clex_train.utils.files import BadFile, require_regular, require_writable_folder, sync_directory, temporary_path

ROPE_FREQS = "rope_freqs.weight"
"""Factors that divide the plain frequencies, for every length; phi3 reads the two tensors of `LONGROPE` instead."""
LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
NUMBER_BYTES = 16
"""Bytes that a number, or the length and type of a text, takes in the header at most."""
GIB = 2**30


@dataclass(frozen=True)
class Field:
    """One key of the header, text as `str` or as bytes.

    `type` and `sub_type` (of an array's items) are `gguf.GGUFValueType`; None infers them.
    """

    key: str
    value: Any
    type: Any = None
    sub_type: Any = None


@dataclass(frozen=True)
class Entry:
    """One tensor, read when it is its turn to be written.

    `shape` has the slowest dimension first, in items of `dtype`; `type` is a `gguf.GGMLQuantizationType`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    type: Any
    read: Callable[[], NDArray[Any]]

    @property
    def num_bytes(self) -> int:
        """Return the size of the data in the file."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Content:
    """A GGUF file that was checked and has not been written."""

    architecture: str
    """`general.architecture`."""
    fields: Sequence[Field]
    """The other keys of the header."""
    entries: Sequence[Entry]
    """Tensors in the order of the file; one at a time is in memory."""
    verify: Callable[[Any], None]
    """Called with a reader of the complete file before it gets its name; an error of it discards the file."""
    alignment: int = 32
    """Bytes to which the data of a tensor is aligned, a power of two."""

    @property
    def max_bytes(self) -> int:
        """Return an upper bound of the file's size."""
        header = sum(_value_size(field.key) + _value_size(field.value) for field in self.fields)
        names = sum(_value_size(entry.name) + NUMBER_BYTES * (len(entry.shape) + 2) for entry in self.entries)
        data = sum(entry.num_bytes + self.alignment for entry in self.entries)
        return header + names + data + 2 * self.alignment + 4 * NUMBER_BYTES


def gguf_package() -> Any:
    """Return the `gguf` package; `ConfigError` with the command that installs it."""
    try:
        import gguf
    except ImportError as error:
        remedy = f"needs the package gguf: {versions.install_command('export')}"
        raise ConfigError("format", "gguf", remedy) from error
    return gguf


def read(path: Path) -> Any:
    """Open a GGUF file as a `gguf.GGUFReader`, tensors mapped. Raises `BadFile` for anything else."""
    require_regular(path)
    try:
        return gguf_package().GGUFReader(path)
    except ConfigError:
        raise
    except Exception as error:  # numpy raises whatever the damaged bytes lead to
        raise BadFile(path, f"not a GGUF file, cut short or damaged ({first_line(error)}); copy it again") from error


def contents(reader: Any, key: str, default: Any = None) -> Any:
    """Return the value of a key of the header, `default` without it."""
    found = reader.get_field(key)
    try:
        return default if found is None else found.contents()
    except UnicodeDecodeError as error:
        raise ConfigError(key, None, "is not text, so the file is damaged; copy it again") from error


def number(reader: Any, key: str, default: float | None = None) -> float | None:
    """Return the number under a key of the header; `ConfigError` for any other value."""
    found = contents(reader, key, default)
    is_number = isinstance(found, (int, float)) and math.isfinite(found)
    require(found is None or is_number, key, found, "should be a number; the file is damaged, copy it again")
    return found  # type: ignore[no-any-return]


def factor_entries(architecture: str, factors: Sequence[float]) -> list[Entry]:
    """Return the tensors by which `architecture` reads factors, one float32 per pair of dimensions."""
    values = np.asarray(factors, dtype=np.float32)
    # One array for both lists, so that the engine has no border between a short and a long context.
    names = LONGROPE if architecture == "phi3" else (ROPE_FREQS,)
    kind = gguf_package().GGMLQuantizationType.F32
    return [Entry(name, values.shape, values.dtype, kind, lambda: values) for name in names]


def require_factors(factors: Sequence[float], num_pairs: int) -> None:
    """Raise `ConfigError` unless there is a positive factor for every pair, in the range of float32."""
    remedy = f"the model rotates {num_pairs} pairs of dimensions; give one factor for each"
    require(len(factors) == num_pairs, "factors", f"[{len(factors)} numbers]", remedy)
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(factors, dtype=np.float64).astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    where = int(bad[0]) if len(bad) else 0
    require(not len(bad), f"factors[{where}]", factors[where], "should be positive and in the range of float32")


def require_written(reader: Any, architecture: str, factors: Sequence[float]) -> None:
    """Raise unless the file has the factors, to the bit."""
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for entry in factor_entries(architecture, factors):
        if not np.array_equal(tensors[entry.name], entry.read()):
            raise RuntimeError(f"{entry.name} read back from the file has other factors")


def write(path: Path, content: Content) -> None:
    """Write a GGUF file, whole or not at all; an existing one is replaced.

    Raises:
        ConfigError: too little space, checked first.
        OSError: the disk is full after all, or cannot be written.
    """
    require_writable_folder("output", path, path.parent, temporary_path(path).name)
    require_space(path, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _published(path) as temporary:
        writer = gguf_package().GGUFWriter(temporary, content.architecture)
        try:
            writer.data_alignment = content.alignment
            _write_all(writer, content.fields, content.entries)
        finally:
            writer.close()
        content.verify(read(temporary))


def require_space(path: Path, content: Content) -> None:
    """Raise `ConfigError` if the disk of `path` has no room for the file; nothing is written."""
    there = next(place for place in path.absolute().parents if place.exists())
    # The file is written beside an older one of the same name, which goes last.
    needed, free = content.max_bytes, shutil.disk_usage(there).free
    remedy = f"needs {needed / GIB:.2f} GiB, and {there} has {free / GIB:.2f} GiB free; make room or name another place"
    require(needed <= free, "output", path, remedy)


def _write_all(writer: Any, fields: Sequence[Field], entries: Sequence[Entry]) -> None:
    for field in fields:
        kind = field.type if field.type is not None else _type_of(field.value)
        writer.add_key_value(field.key, field.value, kind, field.sub_type)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(entry.dtype), entry.num_bytes, entry.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        # A copy only where the layout needs one: `tofile` writes the items in order of memory.
        writer.write_tensor_data(np.ascontiguousarray(entry.read()))


def _type_of(value: Any) -> Any:
    types = gguf_package().GGUFValueType
    if isinstance(value, list):
        return types.ARRAY
    # A bool is an int to Python.
    known = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    return known[type(value)]


def _value_size(value: Any) -> int:
    if isinstance(value, list):
        return NUMBER_BYTES + sum(map(_value_size, value))
    if isinstance(value, str):
        value = value.encode()
    return NUMBER_BYTES + (len(value) if isinstance(value, bytes) else 0)


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file gets its name when the block ends without an error, or is removed."""
    temporary = temporary_path(path)
    try:
        yield temporary
        # By another descriptor: the library closed its own.
        sync_directory(temporary)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = no_room(error)
        # numpy reports a short write by an OSError without a number.
        if cause is not None or (isinstance(error, OSError) and error.errno is None):
            number = errno.ENOSPC if cause is None else cause.errno
            raise OSError(number, os.strerror(number or errno.ENOSPC), str(path)) from error
        raise
