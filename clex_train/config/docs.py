"""Documentation of every key, read from a schema: fields, types, defaults, and the string under each field."""

import ast
import inspect
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any

DOCS = "__field_docs__"
"""Attribute with the descriptions of a class that has no source."""


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """List (key, type, default, description) for `--help` and docs/configuration.md, with groups as dotted keys."""
    docs, rows = field_docs(schema), []
    defaults = schema()
    for item in fields(schema):
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            rows += describe(type(value), f"{prefix}{item.name}.")
        else:
            kind = _choices(item, value) or _type_name(item.type, value)
            rows.append((prefix + item.name, kind, _show(value), docs[item.name]))
    return rows


def field_docs(schema: type) -> dict[str, str]:
    """Return the string under each field of a dataclass and its bases, by field name."""
    docs: dict[str, str] = {}
    # Bases first, so that a subclass can redefine a field and its description.
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(schema: type) -> dict[str, str]:
    if DOCS in vars(schema):
        return dict(vars(schema)[DOCS])
    # From the source: Python drops strings that follow an assignment, so they exist at run time nowhere else.
    tree = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = str(following.value.value)
    return docs


def _choices(item: Field[Any], value: Any) -> str:
    """Join the choices that a field lists in its metadata, if they differ from those of its type."""
    names = "|".join(each.name for each in item.metadata.get("choices", ()))
    return f"list[{names}]" if names and str(item.type).startswith("list") else names


def _type_name(annotation: Any, value: Any) -> str:
    if isinstance(value, Enum):
        return "|".join(type(value).__members__)
    # Short for table cells: str? instead of str | None.
    return str(annotation).replace(" | None", "?")


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return "[" + ",".join(_show(v) for v in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
