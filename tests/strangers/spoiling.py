"""Random corruptions of small files, as functions of a generator: values, bytes, or the type of the file."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECRET_NAME, SECRET = "CLEX_TRAIN_TEST_SECRET", "hunter2-of-the-environment"
OUTSIDE_SECRET = "hunter2-of-another-folder"

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**70, -(2**65), 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "x" * 2000, "..", "../../outside/secret", "/etc/passwd", "a/b", "\x1b[31mred\x07", "\u202etxt", "\ud800",
    f"${{oc.env:{SECRET_NAME}}}", "${", "${data.path}", "???", "true", "1e5", "2024-01-01", [], {}, [None], [[]],
    [0] * 500, ["a", 1, None], {"a": 1}, {"": []}, [[1, 2], [3]], [{}] * 3,
)  # fmt: skip


def spoil_json(content: Any, draw: random.Random) -> Any:
    """Replace, remove, add or exchange one to three values anywhere in parsed JSON."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        parents = list(_containers(content))
        if not parents:
            return draw.choice(VALUES)
        parent = draw.choice(parents)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        action = draw.choice(("replace", "replace", "replace", "remove", "add", "exchange"))
        if action == "add" or not keys:
            _add(parent, draw)
        elif action == "remove":
            del parent[draw.choice(keys)]
        elif action == "exchange":
            one, other = draw.choice(keys), draw.choice(keys)
            parent[one], parent[other] = parent[other], parent[one]
        else:
            parent[draw.choice(keys)] = copy.deepcopy(draw.choice(VALUES))
    return content if draw.random() > 0.02 else draw.choice(VALUES)


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, insert, repeat or replace bytes."""
    at = draw.randrange(len(content) + 1)
    return draw.choice(
        (
            lambda: content[:at],
            lambda: b"",
            lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            lambda: content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            lambda: content[:at] + draw.randbytes(draw.randint(1, 40)) + content[at:],
            lambda: content + content,
            lambda: content[at:] + content[:at],
            lambda: bytes(len(content)),
            lambda: draw.randbytes(len(content)),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: b"[" * 200_000,
            lambda: b'{"a":' * 50_000,
            lambda: b"[" + b"1" * 20_000 + b"]",
            lambda: b"[" + b"[]," * 2_000_000 + b"[]]",
        )
    )()


def spoil_file(path: Path, outside: Path, draw: random.Random) -> None:
    """Replace a regular file by something else, or remove it."""
    path.unlink()
    draw.choice(
        (
            lambda: None,
            lambda: os.mkfifo(path),
            lambda: path.mkdir(),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to(outside / "secret"),
            lambda: path.symlink_to(outside / "nothing"),
            lambda: _sparse(path, 2**40),
        )
    )()


def yaml_bomb(draw: random.Random) -> str:
    """Write YAML whose aliases expand to 10^6 to 10^30 values, or refer to themselves."""
    if draw.random() < 0.2:
        return "a: &a\n  b: [*a, *a]\n"
    merge = draw.random() < 0.5
    lines = ["a0: &a0 {x: [1, 2, 3], y: 4}"]
    for level in range(1, draw.randint(6, 30)):
        before = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} " + (f"{{b: [{before}]}}" if merge else f"[{before}]"))
    return "\n".join([*lines, f"optim: {{lr: *a{level}}}", ""])


def as_text(content: Any) -> bytes:
    """Return the JSON text of any value, with lone surrogates as escapes."""
    return json.dumps(content, indent=1).encode()


def _containers(content: Any) -> Any:
    if isinstance(content, (dict, list)):
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from _containers(value)


def _add(parent: Any, draw: random.Random) -> None:
    value = copy.deepcopy(draw.choice(VALUES))
    if isinstance(parent, dict):
        parent[draw.choice(("", "x", "../x", "\x1b[0m", "name", "format", f"${{oc.env:{SECRET_NAME}}}"))] = value
    else:
        parent.insert(draw.randrange(len(parent) + 1), value)


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


Action = Callable[[], object]
