"""Read JSON and YAML that anyone may have written into typed dataclasses, or refuse it in one line (`BadFile`).

A size is bounded before a file is read, the number of values before it is parsed, the expansion of YAML's aliases while
it is composed. Nothing is interpolated: what a file holds is data.
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
"""A number of bytes, tokens, rows or steps."""

MAX_VALUES = 2**23
"""Values in a JSON file; an empty list takes two bytes of text and sixty in memory."""
MAX_NODES = 50_000
"""Nodes of a YAML file, each alias counted with everything that it stands for."""
LARGEST_YAML = 2**18
"""Bytes of a YAML file; a configuration has some thousands, and parsing takes seconds a megabyte."""
FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

T = TypeVar("T")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Takes words for the types that OmegaConf takes them for: 1e-5 is a number, 2024-01-05 a text.

    PyYAML's compiled parser bounds how deep values may be nested.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def read_json(path: Path, within: Path | None = None, most: int = LARGEST_RECORD) -> Any:
    """Read a JSON file.

    Raises:
        BadFile: it cannot be read, is too large or no JSON.
        FileNotFoundError: there is nothing of this name.
    """
    return parse_json(read_regular(path, within, most), path)


def parse_json(content: bytes, path: Path) -> Any:
    """Parse the content of a JSON file; raises `BadFile`, naming `path`."""
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MAX_VALUES:
        raise BadFile(path, f"more than {MAX_VALUES:,} values")
    try:
        with _gc_paused():
            return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"not JSON ({first_line(error)})") from error


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Within, Python does not look for cycles: among millions of new values that takes longer than parsing them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def convert(content: Any, schema: type[T]) -> T:
    """Check parsed JSON against a type.

    Raises:
        ValueError: a field is missing or of another type; msgspec's own error is none in 0.20.
    """
    try:
        return msgspec.convert(content, schema)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def decode(content: Any, schema: type[T], path: Path) -> T:
    """Check parsed JSON against a dataclass, field by field; keys that it does not have are left out.

    Raises:
        BadFile: a field is missing or of another type.
    """
    try:
        return convert(content, schema)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"damaged ({first_line(error)})") from error


def read_record(path: Path, schema: type[T], within: Path | None = None, most: int = LARGEST_RECORD) -> T:
    """Read a JSON file into a dataclass; raises as `read_json` and `decode`."""
    return decode(read_json(path, within, most), schema, path)


def read_yaml(path: Path, within: Path | None = None) -> Any:
    """Read a YAML file as plain values; raises `BadFile` and `FileNotFoundError` as `read_json`."""
    content = read_regular(path, within, LARGEST_YAML)
    try:
        return _parse_yaml(content.decode("utf-8"), path)
    except BadFile:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, LookupError, OverflowError) as error:
        # Constructors of dates, merges and numbers raise whatever Python does for bad ones.
        raise BadFile(path, f"not valid YAML ({' '.join(str(error).split())[:160]})") from error


def read_yaml_mapping(path: Path, within: Path | None = None) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines; raises as `read_yaml`."""
    content = read_yaml(path, within)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BadFile(path, "should be `key: value` lines")
    return content


def require_bounded(text: str, path: Path | str) -> None:
    """Refuse YAML that expands to more than `MAX_NODES` nodes, whoever is to load it; raises `BadFile`.

    Without an alias it has no more nodes than characters and is left alone.
    """
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
        raise BadFile(path, f"stands for more than {MAX_NODES:,} values, aliases written out; shorten it")


def _num_nodes(node: Any, known: dict[int, int | None], path: Path | str) -> int:
    """Nodes below and with `node`, every alias counted anew."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_num_nodes(part, known, path) for part in parts)
    count = known[id(node)]
    if count is None:
        raise BadFile(path, "an alias inside of what it stands for")
    return count
