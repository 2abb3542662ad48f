"""Rank variables in the environment: invalid values are refused in one line by name."""

import sys

import pytest

from clex_train.console import program
from clex_train.utils import distributed, ranks

ALL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    def set_variables(text: str) -> None:
        # An earlier test in this process may have left a group of one rank.
        monkeypatch.setattr(distributed, "is_initialized", lambda: False)
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for item in text.split():
            monkeypatch.setenv(*item.split("="))

    return set_variables


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ("RANK=abc", "RANK=abc: must be a number, at least 0; a launcher such as torchrun or deepspeed sets it"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1: must be a number, at least 0"),
        ("RANK= WORLD_SIZE=2", "RANK='': must be a number, at least 0"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE=two: must be a number, at least 1"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=0: must be a number, at least 1"),
        ("RANK=0 WORLD_SIZE=99999999999", "WORLD_SIZE=99999999999: must be a number"),
        ("RANK=2 WORLD_SIZE=2", "RANK=2: must be below WORLD_SIZE=2"),
        ("RANK=1", "RANK=1: must be below WORLD_SIZE=1"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4: RANK is not set"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK=x: must be a number, at least 0"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2: must be below WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK=2: must be below LOCAL_WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=4: must be at most WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=abc", "MASTER_PORT=abc: must be a port number from 1 to 65535"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=-1", "MASTER_PORT=-1: must be a port number from 1 to 65535"),
        ("RANK=0 WORLD_SIZE=1 MASTER_PORT=65536", "MASTER_PORT=65536: must be a port number from 1 to 65535"),
    ],
)
def test_invalid_variables_give_one_line_and_exit_code_2(environment, monkeypatch, capsys, variables, line):
    environment(variables)
    monkeypatch.setattr(program, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "argv", ["program"])
    assert program.run(distributed.world_size, str) == program.USER_ERROR
    [said] = capsys.readouterr().err.strip().splitlines()
    assert said.partition(": ")[2].startswith(line)


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ("", (0, 1)),
        ("WORLD_SIZE=1", (0, 1)),
        # Kubernetes sets this variable for a service called `master`; no launcher is involved.
        ("MASTER_PORT=tcp://10.0.0.1:80", (0, 1)),
        ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_PORT=29500", (3, 4)),
    ],
)
def test_variables_of_launchers_are_accepted(environment, variables, launch):
    environment(variables)
    assert (distributed.rank(), distributed.world_size()) == ranks.rank_and_world_size() == launch


def test_a_launch_without_a_rendezvous_address_is_refused(environment):
    environment("RANK=0 WORLD_SIZE=1 MASTER_PORT=29500")
    with pytest.raises(ValueError, match=r"^MASTER_ADDR: not set, where RANK is; a launcher"):
        ranks.require_rendezvous()
