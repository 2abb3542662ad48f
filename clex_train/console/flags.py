"""Flags of Hydra's command line: refuse an unknown one in one line instead of printing the whole usage."""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

from clex_train.utils.errors import ConfigError, InputError

SWITCHES = (
    ("--help", "-h"),
    ("--hydra-help",),
    ("--version",),
    ("--resolve",),
    ("--run", "-r"),
    ("--multirun", "-m"),
    ("--shell-completion", "-sc"),
)
WITH_A_VALUE = (
    ("--package", "-p"),
    ("--config-path", "-cp"),
    ("--config-name", "-cn"),
    ("--config-dir", "-cd"),
    ("--experimental-rerun",),
)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise `InputError` with the message that argparse would print below its usage."""
        raise InputError(f"{message}; --help lists the keys")


def put_last(arguments: Sequence[str]) -> list[str]:
    """Move Hydra's flags behind the overrides: after a flag, Hydra would refuse further overrides.

    Raises `ConfigError` for a flag that Hydra lacks, or for a value that it does not accept.
    """
    overrides, flags = parser().parse_known_args(arguments)[1], list(arguments)
    unknown = [argument for argument in overrides if argument.startswith("-")]
    if unknown:
        raise ConfigError("argument", unknown[0], "give key=value, without dashes; --help lists the keys")
    for override in overrides:
        flags.remove(override)
    return [*overrides, *flags]


def parser() -> ArgumentParser:
    """Return a parser of the flags that Hydra documents."""
    parser = _Parser(add_help=False)
    for names in SWITCHES:
        parser.add_argument(*names, action="store_true")
    for names in WITH_A_VALUE:
        parser.add_argument(*names)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parts = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=parts)
    return parser
