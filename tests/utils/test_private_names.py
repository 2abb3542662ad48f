"""Private names of libraries that this project relies on, which must exist in the installed versions."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from clex_train.utils import versions
from clex_train.utils.private_names import PRIVATE_NAMES, Reach

ROOT = Path(__file__).resolve().parents[2]
PRIVATE = re.compile(r"\b(?!self\b|cls\b)\w+\.(_[a-z]\w+)")
OWN = re.compile(r"^\s*(?:self\.)?(_\w+)\b|def (_\w+)|self\.(_\w+)", re.MULTILINE)


def missing(target: str) -> bool:
    """Return True if a target of the list does not exist."""
    module, _, path = target.partition(":")
    path, _, mentioned = path.partition("=>")
    path, _, attribute = path.partition("@")
    path, _, parameter = path.removesuffix(")").partition("(")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return True
    if mentioned:
        return re.search(rf"\b{re.escape(mentioned)}\b", inspect.getsource(found)) is None
    if parameter:
        return parameter not in inspect.signature(found).parameters
    return bool(attribute) and not any(attribute in assigned(parent) for parent in found.__mro__[:-1])


def assigned(cls: type) -> set[str]:
    """Collect the attributes that a class declares or its methods assign to self."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return set()
    stores = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return stores | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


@pytest.mark.parametrize("reach", PRIVATE_NAMES, ids=lambda reach: reach.target)
def test_every_listed_private_name_exists(reach: Reach) -> None:
    library = reach.target.partition(":")[0].partition(".")[0]
    found = Version(str(versions.installed_version(library)))
    if (reach.since and found < Version(reach.since)) or (reach.cuda and not torch.cuda.is_available()):
        pytest.skip(f"not in {library} {found}")
    assert not missing(reach.target), f"{reach.target} has gone from {library} {found}: {reach.gone}"


@pytest.mark.parametrize(
    "target",
    [
        "torch:nothing",
        "clex_train.utils.versions:describe(nothing)",
        "transformers.cache_utils:Cache@nothing",
        "transformers.modeling_utils:PreTrainedModel.from_pretrained=>no_such_option",
        "nothing:at_all",
    ],
)
def test_the_check_detects_missing_names(target: str) -> None:
    assert missing(target)


def test_targets_are_listed_once_with_a_reason() -> None:
    targets = [reach.target for reach in PRIVATE_NAMES]
    assert len(set(targets)) == len(targets)
    assert all(reach.why and reach.gone for reach in PRIVATE_NAMES)


def test_every_private_name_of_another_object_is_in_the_list() -> None:
    listed = " ".join(reach.target for reach in PRIVATE_NAMES)
    found: dict[str, str] = {}
    for path in [*(ROOT / "clex_train").rglob("*.py"), ROOT / "train.py"]:
        code = path.read_text(encoding="utf-8")
        own = {name for groups in OWN.findall(code) for name in groups if name}
        for name in PRIVATE.findall(re.sub(r'"""[\s\S]*?"""|#.*', "", code)):
            if name not in own and name not in listed and name not in ALLOWED:
                found[name] = str(path.relative_to(ROOT))
    assert not found, f"list them in libraries.reached, or do without: {found}"


ALLOWED = {"_dynamo", "_version", "_device", "_fields", "_asdict", "_replace", "_exit", "_current_frames"}
"""Exempt: modules whose members are listed, names of the standard library, and the optional model of lm-eval."""
