"""The flags of Hydra's command line, so that one it does not know is refused in a line and not by its whole usage."""

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
        """Raise what argparse would print below its usage."""
        raise InputError(f"{message}; --help says what there is")


def put_last(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's flags behind the overrides: between them, Hydra would refuse what follows.

    `ConfigError` for a flag that Hydra does not have, or whose value it does not take.
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
