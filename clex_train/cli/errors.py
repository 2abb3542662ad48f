"""Errors of composing a configuration, and our own, in one line: which key, what is wrong with it, what to do.

    optim.lrr: no such key; did you mean optim.lr?
    experiment=tiny: no such option; did you mean tiny_base, tiny_clex or tiny_continued?

Works for every schema, since what may be written is read off the error itself.
"""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, Node
from omegaconf.errors import OmegaConfBaseException

from clex_train.suggest import did_you_mean, in_words

REPOSITORY = Path(__file__).resolve().parents[2]

REASONS = (
    (r"could not be converted to (\w+)", "should be of type {}"),
    (r"expected one of \[(.*)\]", "should be one of {}"),
    (r"is not a valid bool", "should be true or false"),
    (r"is not Optional", "null is not allowed here"),
    (r"is not a ListConfig", "should be a list such as [1,2]"),
    (r"does not support deletion", "a key cannot be taken away, only set"),
)
"""Sentences of OmegaConf that it gives no type to tell by, and what to say instead."""

ADDED = {"experiment": "an experiment", "corpus": "a corpus"}
"""Groups that no defaults list names."""


def explain(error: BaseException) -> str | None:
    """The one line for a mistake of the user; None for anything else, which deserves its traceback."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value ({_lines(error)[1]}); quote values with special characters"
    cause = _from_omegaconf(error)
    if cause is not None:
        return _no_such_key(error, cause) if _is_unknown_key(cause) else _refused_value(error, cause)
    if isinstance(error, HydraException):
        return _composition(error)
    # Text that cannot be encoded or decoded here is a fault of ours: readers of the user's files say which and where.
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError) and _is_about_input(error):
        return " ".join(str(error).split())
    return None


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or ())
    if not group:
        return _lines(error)[0]
    like = [name for name in options if name.startswith(option)]
    remedy = f"did you mean {in_words(like)}?" if like else did_you_mean(option, options)
    return f"{group}={option}: no such option; {remedy or f'take one of {in_words(options)}'}"


def _from_omegaconf(error: BaseException) -> OmegaConfBaseException | None:
    """The OmegaConf error behind what Hydra raised, if there is one."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OmegaConfBaseException):
        link = link.__cause__
    return link


def _is_unknown_key(cause: OmegaConfBaseException) -> bool:
    return isinstance(cause, (AttributeError, KeyError)) and "not in" in str(cause)


def _no_such_key(error: BaseException, cause: OmegaConfBaseException) -> str:
    key = _quoted(error) or str(cause.full_key)
    names = _names(cause.parent_node)
    if key in names:
        return f"{key}: a mapping takes new names with a plus sign, +{key}=..."
    return f"{key}: no such key; {did_you_mean(key, names) or '--help lists them all'}"


def _refused_value(error: BaseException, cause: OmegaConfBaseException) -> str:
    written = _quoted(error) or str(cause.full_key)
    return f"{written}: {_in_our_words(_lines(cause)[0])}"


def _in_our_words(reason: str) -> str:
    """What a value should be, from OmegaConf's sentence about what it is not."""
    for pattern, words in REASONS:
        found = re.search(pattern, reason)
        if found:
            return words.format(*(group.lower() for group in found.groups()))
    return reason[0].lower() + reason[1:]


def _composition(error: HydraException) -> str:
    first, *rest = _lines(error)
    written = _quoted(error)
    if written in ADDED:
        return f"{written}: {ADDED[written]} is added with a plus sign: +{written}=NAME"
    return f"{written}: no such group; --help lists them" if "No match" in " ".join((first, *rest)) else first


def _quoted(error: BaseException) -> str:
    """The override as it was typed, from Hydra's message."""
    if not isinstance(error, ConfigCompositionException):
        return ""
    first = _lines(error)[0]
    for opening, ending in (("Error merging override ", ""), ("Could not override '", "'")):
        if first.startswith(opening):
            return first.removeprefix(opening).partition(ending)[0] if ending else first.removeprefix(opening)
    return ""


def _names(node: Node | None) -> list[str]:
    """Every key of the configuration that `node` is part of, dotted, groups included."""
    if node is None:
        return []
    root = node._get_root()
    return list(_dotted(root, "")) if isinstance(root, DictConfig) else []


def _dotted(node: DictConfig, prefix: str) -> Iterator[str]:
    for key in node:
        name = f"{prefix}{key!s}"
        if name == "hydra":
            continue
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _dotted(child, f"{name}.")


def _is_about_input(error: ValueError) -> bool:
    """Raised by our own code or by Hydra: out of any other library a ValueError is a bug to look into."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename).resolve() if frames else REPOSITORY
    is_ours = file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts
    return is_ours or "hydra" in file.parts


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
