"""Explain errors of the configuration in one line: key, fault, remedy.

    optim.lrr: no such key; did you mean optim.lr?
    experiment=tiny: no such option; did you mean tiny_base, tiny_clex or tiny_continued?

Works for every schema, since the valid keys are read off the error itself.
"""

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import hydra
import yaml  # type: ignore[import-untyped]
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, Node
from omegaconf.errors import OmegaConfBaseException

from clex_train.console import config_files
from clex_train.utils import locations
from clex_train.utils.errors import InputError
from clex_train.utils.suggestions import did_you_mean, in_words

REPOSITORY = locations.ROOT
HYDRA = Path(str(hydra.__file__)).resolve().parent

REASONS = (
    (r"could not be converted to (\w+)", "should be of type {}"),
    (r"Invalid value '(?:True|False)', expected one of \[(.*)\]", "should be one of {} (in quotes, in a YAML file)"),
    (r"expected one of \[(.*)\]", "should be one of {}"),
    (r"is not a valid bool", "should be true or false"),
    (r"is not Optional", "null is not allowed here"),
    (r"is not a ListConfig", "should be a list such as [1,2]"),
    (r"Cannot merge DictConfig with ListConfig", "should be `key: value` lines, not a list"),
    (r"is not a subclass of", "no such entry yet; add it in a YAML file"),
    (r"does not support deletion", "a key cannot be removed, only set"),
)
"""Messages of OmegaConf that have no type of their own, and their replacements."""

ADDED = {"experiment": "an experiment", "corpus": "a corpus"}
"""Groups that no defaults list names."""


def explain(error: BaseException) -> str | None:
    """Return the one line for a mistake of the user; None for any other error, which keeps its traceback."""
    line = _line(error)
    return None if line is None else " ".join(line.split())


def _line(error: BaseException) -> str | None:
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        return _unparsed(str(error.override).lstrip("+"))
    if isinstance(error, yaml.YAMLError):
        return _not_yaml(error)
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8()
    cause = _from_omegaconf(error)
    if cause is not None:
        line = _no_such_key(error, cause) if _is_unknown_key(cause) else _refused_value(error, cause)
        return f"{_place(error, cause)}{line}"
    if isinstance(error, HydraException):
        return _composition(error)
    if isinstance(error, InputError):
        return str(error)
    file = _file_of_hydra(error)
    if isinstance(error, ValueError) and file:
        # Hydra raises a plain ValueError for some refused arguments.
        return str(error)
    if isinstance(error, TypeError) and file and file.name == "defaults_list.py":
        return "a group of the configuration is null where it takes the name of an option; --help lists them"
    return None


def _missing_option(error: MissingConfigException) -> str:
    # The groups of conf/ are folders of one level: any further slash was typed by the user.
    group, slash, option = str(error.missing_cfg_file).partition("/")
    options = list(error.options or ())
    if not slash:
        return _lines(error)[0]
    if group in ("model", "data") and _is_like_a_path(option):
        return f"{group}={option}: no such option; for a directory of your own: {group}.path={option}"
    like = [name for name in options if name.startswith(option)]
    remedy = f"did you mean {in_words(like)}?" if like else did_you_mean(option, options)
    every = f"take one of {in_words(options)}" if options else f"conf/{group} has no file {option}.yaml"
    return f"{group}={option}: no such option; {remedy or every}"


def _is_like_a_path(option: str) -> bool:
    return "/" in option or option.startswith((".", "~")) or Path(option).is_dir()


def _from_omegaconf(error: BaseException) -> OmegaConfBaseException | None:
    """Find the OmegaConf error behind the one that Hydra raised, if there is one."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OmegaConfBaseException):
        link = link.__cause__ or (link.__context__ if isinstance(link, HydraException) else None)
    return link


def _is_unknown_key(cause: OmegaConfBaseException) -> bool:
    return isinstance(cause, (AttributeError, KeyError)) and "not in" in str(cause)


def _unparsed(override: str) -> str:
    """Explain why Hydra cannot read an argument."""
    key, equals, value = override.partition("=")
    bare = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", value)
    if not equals or not key:
        return f"{override}: not of the form key=value"
    for opening, closing in ("[]", "{}", "()"):
        if bare.count(opening) != bare.count(closing):
            missing = closing if bare.count(opening) > bare.count(closing) else opening
            return f"{override}: a bracket is missing: {missing}"
    if "'" in bare or '"' in bare:
        return f"{override}: a quotation mark is not closed"
    return f"{override}: the value cannot be read; quote it if it has special characters: '{key}=\"...\"'"


def _not_yaml(error: yaml.YAMLError) -> str:
    """Name the file and the line, and explain the fault."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{' '.join(str(error).split())}; save the file as UTF-8 text"
    mark = error.problem_mark or error.context_mark
    place = f"{config_files.shown(Path(mark.name))}, line {mark.line + 1}" if mark else "configuration"
    reason = str(error.problem or error.context or "cannot be read")
    what = "a tab is no indentation; use spaces" if "'\\t'" in reason else reason
    opened = error.context_mark
    since = f" ({error.context}, which began in line {opened.line + 1})" if opened and error.context else ""
    return f"{place}: not valid YAML: {what}{since}"


def _not_utf8() -> str | None:
    """Name the configuration file that is not UTF-8; None if all are, and the error has another cause.

    The error itself names the bytes only.
    """
    folders = [REPOSITORY / "conf", *map(Path, re.findall(r"file://([^,\]'\"]+)", " ".join(sys.argv[1:])))]
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        content = file.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            return f"{config_files.shown(file)}, line {line}: not UTF-8; save the file as UTF-8 text"
    return None


def _place(error: BaseException, cause: OmegaConfBaseException) -> str:
    """Name the file in conf/ with the mistake, and its line; empty for a mistake on the command line."""
    found = re.match(r"In '([^']+)': ", _lines(error)[0])
    if not found:
        return ""
    file = REPOSITORY / "conf" / f"{found[1]}.yaml"
    if not file.is_file():
        return f"{found[1]}: "
    line = config_files.line_of(file, str(cause.full_key))
    return f"{config_files.shown(file)}{f', line {line}' if line else ''}: "


def _no_such_key(error: BaseException, cause: OmegaConfBaseException) -> str:
    written = _quoted(error)
    key = written if written and "=" not in written else str(cause.full_key)
    return f"{key}: no such key; {did_you_mean(key, _names(cause.parent_node)) or '--help lists them all'}"


def _refused_value(error: BaseException, cause: OmegaConfBaseException) -> str:
    written = _quoted(error) or str(cause.full_key)
    return f"{written or 'the file'}: {_expected_value(_lines(cause)[0])}"


def _expected_value(reason: str) -> str:
    """Replace OmegaConf's message by one that names the expected value."""
    for pattern, words in REASONS:
        found = re.search(pattern, reason)
        if found:
            return words.format(*(group.lower() for group in found.groups()))
    return reason[0].lower() + reason[1:]


def _composition(error: HydraException) -> str:
    first, *rest = _lines(error)
    written = _quoted(error)
    ambiguous = re.fullmatch(r"Ambiguous value for argument '([^=]+)=(.*)'", first)
    if ambiguous:
        key, value = ambiguous.groups()
        return f"{key}={value}: several values; a list is written {key}=[{value}], a sweep needs -m"
    if written in ADDED:
        return f"{written}: {ADDED[written]} is added with a plus sign: +{written}=NAME"
    return f"{written}: no such group; --help lists them" if "No match" in " ".join((first, *rest)) else first


def _quoted(error: BaseException) -> str:
    """Extract the override from Hydra's message, without the plus signs that mappings get."""
    if not isinstance(error, ConfigCompositionException):
        return ""
    first = _lines(error)[0]
    for opening, ending in (("Error merging override ", ""), ("Could not override '", "'")):
        if first.startswith(opening):
            written = first.removeprefix(opening)
            return (written.partition(ending)[0] if ending else written).lstrip("+")
    return ""


def _names(node: Node | None) -> list[str]:
    """List every key of the configuration that `node` is part of, dotted, groups included."""
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


def _file_of_hydra(error: BaseException) -> Path | None:
    """Return the source file of Hydra that raised an error; None for an error from elsewhere."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename).resolve() if frames else None
    return file if file and file.is_relative_to(HYDRA) else None


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
