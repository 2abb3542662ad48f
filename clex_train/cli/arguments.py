"""`key=value` arguments of the programs that are not composed by Hydra."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from clex_train.cli.overrides import for_yaml
from clex_train.records import require_bounded
from clex_train.schema_docs import describe


def parse(schema: type, arguments: Sequence[str]) -> Any:
    """An instance of the dataclass `schema`; `ValueError` or an error of OmegaConf names the key."""
    merged = OmegaConf.structured(schema)
    alone = [argument for argument in arguments if "=" not in argument]
    if len(alone) > 1:
        raise ValueError(f"{' '.join(alone)}: name one run folder or model; other arguments have the form key=value")
    for argument in arguments:
        argument = _named(schema, argument)
        try:
            written = for_yaml(schema, argument)
            require_bounded(written.partition("=")[2], argument)
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([written]))
        except RecursionError as error:
            raise ValueError(
                f"{argument.partition('=')[0]}: the value is nested too deeply; check its brackets"
            ) from error
        except yaml.YAMLError as error:
            raise ValueError(f"{argument}: the value is not valid YAML; check its brackets and quotes") from error
    return OmegaConf.to_object(merged)


def _named(schema: type, argument: str) -> str:
    """The argument as key=value; a folder alone is a run if it is a run folder, else a model, where there are both."""
    if "=" in argument:
        return argument
    path = Path(argument)
    takes_model = {"run", "model"} <= {field.name for field in fields(schema)}
    if not takes_model or argument.startswith("-") or not ("/" in argument or path.is_dir()):
        raise ValueError(f"{argument}: arguments have the form key=value; --help lists the keys")
    is_run = (path / "config.yaml").is_file() or (path.parts[:1] == ("runs",) and not path.exists())
    return f"{'run' if is_run else 'model'}={argument}"


def usage(text: str | None, schema: type) -> str:
    """A program's own text and a line for every key of `schema`."""
    lines = [f"  {key} ({kind}; {default})\n      {meaning}" for key, kind, default, meaning in describe(schema)]
    return f"{text}\nKeys (type; default):\n" + "\n".join(lines)
