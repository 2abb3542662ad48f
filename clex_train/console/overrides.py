"""Rewrite `key=value` arguments so that text fields get the text as it was typed, and mappings take new names.

Hydra and YAML convert some words: 2024_01_05 is the number 20240105, 1e3 is 1000.0 and `no` is false. Values of text
fields are therefore quoted before they are parsed, and so is the name of a choice, where YAML would take `off` for
false. Values that are quoted already, `null`, interpolations and Hydra's functions are unchanged.
"""

import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

ATOM = re.compile(r"[\w.:+\-]+")
"""Items of lists and mappings that are quoted, among them every one that could parse as a number or a boolean."""
FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)
MULTIRUN = re.compile(r"-m|--multirun|\+{0,2}hydra\.mode=(RunMode\.)?MULTIRUN")


@dataclass(frozen=True)
class Syntax:
    """Quoting rule of the parser that comes next; with `sweeps`, commas outside brackets separate runs of a sweep."""

    quote: Callable[[str], str]
    sweeps: bool = False


def for_hydra(schema: type, arguments: Sequence[str]) -> list[str]:
    """Rewrite the arguments of a program that Hydra composes."""
    syntax = Syntax(_hydra_quotes, sweeps=any(map(MULTIRUN.fullmatch, arguments)))
    return [_for_hydra(schema, argument, syntax) for argument in arguments]


def for_yaml(schema: type, argument: str) -> str:
    """Rewrite a `key=value` argument whose value YAML parses."""
    key, _, value = argument.partition("=")
    return f"{key}={_as_typed(value, type_at(schema, key), Syntax(_yaml_quotes))}"


def passes_mapping(schema: type, key: str) -> str | None:
    """Return the mapping at or above a dotted key, such as `launch.environment` for `launch.environment.CC`."""
    parts = key.split(".")
    prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if typing.get_origin(type_at(schema, prefix)) is dict), None)


def type_at(schema: Any, key: str) -> Any:
    """Return the type at a dotted key (`a.0` for an item of a list); None for a key that is not in the schema."""
    here = schema
    for part in key.split("."):
        if typing.get_origin(here) in (dict, list):
            here = typing.get_args(here)[-1]
        elif is_dataclass(here) and isinstance(here, type):
            here = typing.get_type_hints(here).get(part)
        else:
            return None
        here = _without_none(here)
    return here


def _for_hydra(schema: type, argument: str, syntax: Syntax) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith(("-", "~")):
        return argument
    name = key.lstrip("+")
    value = _as_typed(value, type_at(schema, name), syntax)
    mapping = passes_mapping(schema, name)
    if mapping is None:
        return f"{key}={value}"
    # New names need `++`, and a new entry that is a dataclass can only be added whole.
    path = name.removeprefix(mapping).strip(".").split(".")
    is_entry = is_dataclass(type_at(schema, f"{mapping}.{path[0]}")) and _is_text_in_braces(path[0])
    if not is_entry or (syntax.sweeps and _is_swept(value)):
        return f"++{name}={value}"
    for part in reversed(path):
        value = f"{{{part}:{value}}}"
    return f"++{mapping}={value}"


def _is_text_in_braces(name: str) -> bool:
    """Return True if Hydra reads `name` in `{name: value}` as text, unlike 2024 or `true`."""
    try:
        key = next(iter(OverridesParser.create().parse_override(f"key={{{name}:0}}").value()))  # type: ignore[arg-type]
    except (HydraException, StopIteration):
        return False
    return isinstance(key, str) and key == name


def _is_swept(value: str) -> bool:
    """Return True if a value has one part for each run of a sweep: commas outside brackets, or a function."""
    try:
        return OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except HydraException:
        return False


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [choice for choice in typing.get_args(hint) if choice is not type(None)] or [None]
    return hint


def _as_typed(value: str, hint: Any, syntax: Syntax) -> str:
    """Quote the items of `value` whose type `hint` is text."""
    if hint is str or _is_choice(hint):
        items = _split(value, ",") if syntax.sweeps else []
        items = [item.strip() for item in items] if len(items) > 1 else [value]
        return ",".join(item if _stays(item, hint) else syntax.quote(item) for item in items)
    body = value.strip()
    if typing.get_origin(hint) is list and body[:1] == "[" and body[-1:] == "]":
        (inner,) = typing.get_args(hint)
        return f"[{','.join(_item(item, inner, syntax) for item in _split(body[1:-1], ','))}]"
    is_mapping = typing.get_origin(hint) is dict or is_dataclass(hint)
    if is_mapping and body[:1] == "{" and body[-1:] == "}":
        return f"{{{','.join(_entry(item, hint, syntax) for item in _split(body[1:-1], ','))}}}"
    return value


def _item(text: str, hint: Any, syntax: Syntax) -> str:
    """Quote one item of a list or mapping, without the spaces around it."""
    bare = text.strip()
    if _is_choice(hint):
        return text if _stays(bare, hint) else syntax.quote(bare)
    if hint is not str:
        return _as_typed(text, hint, syntax)
    return syntax.quote(bare) if ATOM.fullmatch(bare) and bare != "null" else text


def _entry(text: str, hint: Any, syntax: Syntax) -> str:
    name, colon, value = text.partition(":")
    if not colon:
        return text
    if typing.get_origin(hint) is dict:
        inner = _without_none(typing.get_args(hint)[1])
    else:
        known = {field.name for field in fields(hint)}
        inner = type_at(hint, name.strip()) if name.strip() in known else None
    return f"{name}:{_item(value, inner, syntax)}"


def _is_choice(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _stays(text: str, hint: Any) -> bool:
    """Return True if a value is unchanged: empty, quoted or escaped by the user, null, an interpolation, a function.

    An unknown choice is unchanged too, and is later refused as it was typed.
    """
    if _is_choice(hint):
        return text not in hint.__members__
    return (
        not text
        or text[0] in "'\""
        or "\\" in text
        or "${" in text
        or text.strip() == "null"
        or FUNCTION.fullmatch(text) is not None
    )


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of quotes and brackets; a text of white space has no items."""
    return ["".join(item) for item in _items(text, separator)] if text.strip() else []


def _items(text: str, separator: str) -> Iterator[list[str]]:
    item, depth, quote = list[str](), 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == separator and depth == 0:
            yield item
            item = []
            continue
        item.append(character)
    yield item


def _hydra_quotes(text: str) -> str:
    return QuotedString(text, Quote.double if "'" in text else Quote.single).with_quotes()


def _yaml_quotes(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
