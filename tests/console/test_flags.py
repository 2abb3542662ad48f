"""Hydra's flags on the command line: unknown ones are refused in one line, known ones may appear anywhere."""

import sys

import hydra
import pytest
from hydra._internal.utils import get_args_parser

from clex_train.config.root import Config
from clex_train.console import flags, program


def test_the_flags_match_the_installed_hydra():
    known = {name for action in flags.parser()._actions for name in action.option_strings}
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert known == theirs, hydra.__version__


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("-x", "argument=-x: give key=value, without dashes; --help lists the keys"),
        ("--hlep", "argument=--hlep: give key=value, without dashes"),
        ("--seed=1", "argument=--seed=1: give key=value, without dashes"),
        ("--cfg=all_of_it", "argument --cfg/-c: invalid choice: 'all_of_it'"),
        ("--config-dir", "argument --config-dir/-cd: expected one argument"),
    ],
)
def test_a_flag_that_hydra_refuses_is_reported_in_one_line(monkeypatch, capsys, typed, line):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", typed])
    assert program.run(lambda: pytest.fail("Hydra was asked"), str, Config) == program.USER_ERROR
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: {line}")


def test_overrides_may_follow_a_flag():
    typed = ["+experiment=tiny_base", "--cfg", "job", "seed=2", "-m", "-cd", "a=b", "optim.lr=-1", "--info"]
    overrides, put = ["+experiment=tiny_base", "seed=2", "optim.lr=-1"], flags.put_last(typed)
    assert put == [*overrides, "--cfg", "job", "-m", "-cd", "a=b", "--info"]
    parsed = get_args_parser().parse_args(put)
    assert (parsed.overrides, parsed.cfg, parsed.config_dir, parsed.multirun) == (overrides, "job", "a=b", True)
