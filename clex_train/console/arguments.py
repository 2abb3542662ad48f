"""`key=value` arguments of the programs that are not composed by Hydra."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from clex_train.config.docs import describe
from clex_train.console.overrides import for_yaml
from clex_train.utils.errors import ConfigError, InputError, RunStopped
from clex_train.utils.records import require_bounded

IN_A_GROUP = re.compile(r"(?<![\w./])(model|data|evaluation|attention)\.([a-z]\w*)")
"""Keys of training as messages name them, and not a part of a file's name."""


def parse(schema: type, arguments: Sequence[str]) -> Any:
    """Parse arguments into an instance of the dataclass `schema`; `ConfigError` or an OmegaConf error names the key."""
    merged = OmegaConf.structured(schema)
    alone = [argument for argument in arguments if "=" not in argument]
    if len(alone) > 1:
        raise ConfigError(
            " ".join(alone), None, "name one run folder or model; other arguments have the form key=value"
        )
    for argument in arguments:
        argument = _named(schema, argument)
        try:
            written = for_yaml(schema, argument)
            require_bounded(written.partition("=")[2], argument)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([written]))
        except RecursionError as error:
            raise ConfigError(
                argument.partition("=")[0], None, "the value is nested too deeply; check its brackets"
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(argument, None, "the value is not valid YAML; check its brackets and quotes") from error
    return OmegaConf.to_object(merged)


@contextmanager
def named_as_typed(args: Any) -> Iterator[None]:
    """Translate keys of training in errors and log lines of shared code to the keys of this command line.

    `args` is the result of `parse` for a schema with `run` and `model`.
    """
    typed = partial(IN_A_GROUP.sub, partial(_own_key, args))

    def rename(record: logging.LogRecord) -> bool:
        if record.name.startswith("clex_train"):
            record.msg, record.args = typed(record.getMessage()), None
        return True

    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.addFilter(rename)
    try:
        yield
    except RunStopped as error:
        raise RunStopped(typed(str(error))) from error
    except InputError as error:
        line = str(error)
        if typed(line) == line:
            raise
        raise InputError(typed(line)) from error
    finally:
        for handler in handlers:
            handler.removeFilter(rename)


def _own_key(args: Any, found: re.Match[str]) -> str:
    """Return the key of `args` for a key of a group; a key that it lacks is unchanged."""
    group, key = found.groups()
    own = {
        ("model", "path"): "run" if args.run else "model",
        ("data", "path"): "data",
        ("evaluation", "path"): "data",
        ("attention", "implementation"): "attention",
    }.get((group, key), key)
    return own if own in {field.name for field in fields(args)} else found[0]


def _named(schema: type, argument: str) -> str:
    """Return the argument as key=value; a folder alone becomes `run` if it is a run folder, else `model`."""
    if "=" in argument:
        return argument
    path = Path(argument)
    takes_model = {"run", "model"} <= {field.name for field in fields(schema)}
    if not takes_model or argument.startswith("-") or not ("/" in argument or path.is_dir()):
        raise ConfigError(argument, None, "arguments have the form key=value; --help lists the keys")
    is_run = (path / "config.yaml").is_file() or (path.parts[:1] == ("runs",) and not path.exists())
    return f"{'run' if is_run else 'model'}={argument}"


def usage(text: str | None, schema: type) -> str:
    """Format the text of `--help`: `text`, and a paragraph for every key of `schema`."""
    indent = " " * 6
    lines = [
        f"  {key} ({kind}; {default})\n"
        + fill(" ".join(meaning.split()), 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        for key, kind, default, meaning in describe(schema)
    ]
    return f"{text}\nKeys (type; default):\n" + "\n".join(lines)
