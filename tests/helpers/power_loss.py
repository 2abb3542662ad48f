"""A reference model of the possible contents of a journalling file system after a power cut, below one folder.

    data of a file       as at its last fsync, or else empty, or zeros of its length
    names in a folder    as at the folder's last fsync, or else as at the power cut

fsync, rename and unlink are recorded from within the process. The disk is read before each of them, so that files may
be written by any library.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

END = "the end"
CALLS = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")


@dataclass(eq=False)
class Node:
    """The durable part of a file or folder, independent of its name."""

    is_folder: bool
    data: bytes | None = None
    names: dict[str, "Node"] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """Possible contents of a disk at a moment: bytes by relative path, None for a folder."""

    moment: str
    kind: str
    files: dict[str, bytes | None]

    def write(self, folder: Path) -> Path:
        """Write the image to a new folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in sorted(self.files.items()):
            if content is None:
                (folder / name).mkdir(parents=True, exist_ok=True)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return folder


class Disk:
    """Record file operations below `root`, where everything is durable at the start."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[Image] = []
        self._nodes: dict[int, Node] = {}
        self._moment("the beginning", record=False)
        for path in (root, *root.rglob("*")):
            self._sync(path)

    def record(self, monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[Image]:
        """Return the distinct images that a power cut during `action` or right after it can leave."""
        with monkeypatch.context() as patched:
            for name in CALLS:
                patched.setattr(os, name, self._watched(name, getattr(os, name)))
            action()
        self._moment(END)
        return self.images

    def _watched(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def watched(*given: object, **named: object) -> object:
            self._moment(f"{name} {given[0] if given else ''}")
            result = call(*given, **named)
            if name == "fsync":
                self._sync(Path(os.readlink(f"/proc/self/fd/{given[0]}")))
            # The inode number of a deleted file may be reused by a new one.
            self._forget_deleted_nodes()
            return result

        return watched

    def _sync(self, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        node = self._node(path)
        if node.is_folder:
            node.names = {entry.name: self._node(entry) for entry in path.iterdir()}
        else:
            node.data = path.read_bytes()

    def _node(self, path: Path) -> Node:
        return self._nodes.setdefault(path.stat().st_ino, Node(path.is_dir()))

    def _forget_deleted_nodes(self) -> None:
        there = {path.stat().st_ino for path in (self.root, *self.root.rglob("*"))}
        self._nodes = {number: node for number, node in self._nodes.items() if number in there}

    def _moment(self, moment: str, record: bool = True) -> None:
        for path in self.root.rglob("*"):
            self._node(path)
        if not record:
            return
        for kind, files in self._possible():
            if moment == END or all(files != image.files for image in self.images):
                self.images.append(Image(moment, kind, files))

    def _possible(self) -> Iterator[tuple[str, dict[str, bytes | None]]]:
        yield "names and data lost", dict(_durable(self._node(self.root), ""))
        for kind, lose in (("data lost", lambda size: b""), ("data zeroed", bytes)):
            yield kind, dict(self._current_contents(lose))
        yield "nothing lost", dict(self._current_contents(None))

    def _current_contents(self, lose: Callable[[int], bytes] | None) -> Iterator[tuple[str, bytes | None]]:
        for path in self.root.rglob("*"):
            name, node = str(path.relative_to(self.root)), self._node(path)
            if node.is_folder:
                yield name, None
            elif lose is None:
                yield name, path.read_bytes()
            else:
                yield name, lose(path.stat().st_size) if node.data is None else node.data


def _durable(node: Node, prefix: str) -> Iterator[tuple[str, bytes | None]]:
    for name, child in node.names.items():
        yield prefix + name, None if child.is_folder else child.data or b""
        yield from _durable(child, f"{prefix}{name}/")
