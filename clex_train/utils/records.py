"""Safe reading of untrusted JSON and YAML into typed dataclasses; anything else is refused in one line (`BadFile`).

Size is bounded before a file is read, the number of values before it is parsed, and the expansion of YAML aliases while
it is composed. Nothing is interpolated: file contents are data.
"""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml  # type: ignore[import-untyped]

from clex_train.utils.errors import first_line
from clex_train.utils.files import LARGEST_RECORD, BadFile, read_regular

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""Number of bytes, tokens, rows or steps."""

MAX_VALUES = 2**23
"""Values in a JSON file: an empty list takes two bytes of text and sixty of memory."""
MAX_NODES = 50_000
"""Nodes of a YAML file, each alias counted with everything that it expands to."""
LARGEST_YAML = 2**18
"""Bytes of a YAML file: a configuration has a few thousand, and parsing takes seconds per megabyte."""
FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

T = TypeVar("T")


# The compiled parser bounds the depth of nesting; the pure Python one ends in a RecursionError.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML loader that resolves scalars like OmegaConf: 1e-5 is a number, 2024-01-05 a text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def read_json(path: Path, within: Path | None = None, most: int = LARGEST_RECORD) -> Any:
    """Read a JSON file.

    Raises:
        BadFile: the file cannot be read, is too large or not JSON.
        FileNotFoundError: no such file.
    """
    return parse_json(read_regular(path, within, most), path)


def parse_json(content: bytes, path: Path) -> Any:
    """Parse the contents of a JSON file; raises `BadFile`, naming `path`."""
    # An upper bound from three passes over the bytes, before any Python object exists.
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
        raise BadFile(path, f"more than {MAX_VALUES:,} values")
    try:
        with _gc_paused():
            return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"not JSON ({first_line(error)})") from error


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector."""
    enabled = gc.isenabled()
    # Each collection visits all live values; with millions of new ones that takes longer than parsing.
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def convert(content: Any, schema: type[T]) -> T:
    """Convert parsed JSON to a type.

    Raises:
        ValueError: a field is missing or of another type.
    """
    try:
        return msgspec.convert(content, schema)
    # In msgspec 0.20 its own error is not a ValueError.
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def decode(content: Any, schema: type[T], path: Path) -> T:
    """Convert parsed JSON to a dataclass, field by field; unknown keys are ignored.

    Raises:
        BadFile: a field is missing or of another type.
    """
    try:
        return convert(content, schema)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"damaged ({first_line(error)})") from error


def read_record(path: Path, schema: type[T], within: Path | None = None, most: int = LARGEST_RECORD) -> T:
    """Read a JSON file into a dataclass; raises like `read_json` and `decode`."""
    return decode(read_json(path, within, most), schema, path)


def read_yaml(path: Path, within: Path | None = None) -> Any:
    """Read a YAML file as plain values; raises `BadFile` and `FileNotFoundError` like `read_json`."""
    content = read_regular(path, within, LARGEST_YAML)
    try:
        return _parse_yaml(content.decode("utf-8"), path)
    except BadFile:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, OverflowError) as error:
        # PyYAML's constructors of dates, merges and numbers raise Python's own errors for bad ones.
        raise BadFile(path, f"not valid YAML ({' '.join(str(error).split())[:160]})") from error


def read_yaml_mapping(path: Path, within: Path | None = None) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines; raises like `read_yaml`."""
    content = read_yaml(path, within)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BadFile(path, "should be `key: value` lines")
    return content


def require_bounded(text: str, path: Path | str) -> None:
    """Refuse YAML that expands to more than `MAX_NODES` nodes, whichever loader reads it next; raises `BadFile`."""
    # Without an anchor there are no aliases, and so no more nodes than characters.
    if "&" in text:
        _require_few_nodes(yaml.compose(text, _Loader), path)


def _parse_yaml(text: str, path: Path) -> Any:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        _require_few_nodes(root, path)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _require_few_nodes(root: Any, path: Path | str) -> None:
    if root is not None and _num_nodes(root, {}, path) > MAX_NODES:
        raise BadFile(path, f"expands to more than {MAX_NODES:,} values, aliases included; shorten it")


def _num_nodes(node: Any, known: dict[int, int | None], path: Path | str) -> int:
    """Count the nodes at and below `node`, aliases expanded."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        # Marks a node under way, so that an alias to its own ancestor is detected instead of followed forever.
        known[id(node)] = None
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_num_nodes(part, known, path) for part in parts)
    count = known[id(node)]
    if count is None:
        raise BadFile(path, "contains an alias to its own parent")
    return count
