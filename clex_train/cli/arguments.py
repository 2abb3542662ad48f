"""`key=value` arguments of the programs that are not composed by Hydra."""

from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from clex_train.cli.overrides import for_yaml
from clex_train.schema_docs import describe


def parse(schema: type, arguments: Sequence[str]) -> Any:
    """An instance of the dataclass `schema`; `ValueError` or an error of OmegaConf names the key."""
    merged = OmegaConf.structured(schema)
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument}: arguments have the form key=value; --help lists the keys")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([for_yaml(schema, argument)]))
        except yaml.YAMLError as error:
            raise ValueError(f"{argument}: the value is not valid YAML; check its brackets and quotes") from error
    return OmegaConf.to_object(merged)


def usage(text: str | None, schema: type) -> str:
    """A program's own text and a line for every key of `schema`."""
    lines = [f"  {key} ({kind}; {default})\n      {meaning}" for key, kind, default, meaning in describe(schema)]
    return f"{text}\nKeys (type; default):\n" + "\n".join(lines)
