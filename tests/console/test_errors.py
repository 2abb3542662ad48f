"""Error lines for mistakes on the command line, through the real composition of the configuration."""

import pickle
from contextlib import suppress
from pathlib import Path
from shutil import copytree

import pytest
import torch

from clex_train.console import program
from clex_train.console.errors import explain
from clex_train.utils.errors import ConfigError, renamed_key, require
from clex_train.utils.files import BadFile
from tests.helpers.composing import CONF, composed

PLAIN = "it names the run's folder by default: a plain name of 1 to 200 bytes, without slashes"
LAUNCHERS = "apptainer, cpu, deepspeed, h100_infiniband, pyxis, task_per_rank or torchrun"


def line_for(*overrides: str) -> str:
    try:
        composed(*overrides)
    except Exception as error:
        line = explain(error)
        assert line is not None
        assert "\n" not in line
        return line
    raise AssertionError(f"{overrides} composed")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
        ("optimm.lr=1", "optimm.lr: no such key; did you mean optim.lr?"),
        ("evaluation.seq_len=3", "evaluation.seq_len: no such key; did you mean data.seq_len?"),
        ("sed=1", "sed: no such key; did you mean seed?"),
        ("optim.lr=abc", "optim.lr=abc: should be of type float"),
        ("engine.micro_batch=1.5", "engine.micro_batch=1.5: should be of type integer"),
        ("evaluation.lengths=[a,b]", "evaluation.lengths=[a,b]: should be of type integer"),
        ("optim.betas=3", "optim.betas=3: should be a list such as [1,2]"),
        ("scaling.positions=rnd", "scaling.positions=rnd: should be one of plain, random, uniform, skip, mix"),
        ("dry_run=maybe", "dry_run=maybe: should be true or false"),
        ("seed=null", "seed=null: null is not allowed here"),
        ("~optim.lr", "~optim.lr: a key cannot be removed, only set"),
        ("scaling=clexx", "scaling=clexx: no such option; did you mean clex or clex_ntk?"),
        ("experiment=tiny_clex", "experiment: an experiment is added with a plus sign: +experiment=NAME"),
        ("+experiment=tiny_clxe", "experiment=tiny_clxe: no such option; did you mean tiny_clex or tiny_base?"),
        ("+experiments=tiny_clex", "experiments: no such key; --help lists them all"),
        ("data=corpora/mine", "data=corpora/mine: no such option; for a directory of your own: data.path=corpora/mine"),
        ("model=/mine/7b", "model=/mine/7b: no such option; for a directory of your own: model.path=/mine/7b"),
        ("launch=a/b", f"launch=a/b: no such option; take one of {LAUNCHERS}"),
        ("name=../../x", f"name=../../x: {PLAIN}"),
        ("name=''", f"name='': {PLAIN}"),
        ("output_dir=''", "output_dir='': name the run's folder"),
        ("output_dir=' '", "output_dir=' ': name the run's folder"),
        ("data.path=null", "data.path: name a token store; `python -m data_prep tokenize` writes one"),
        (
            "+model.revision=abc",
            "model.revision=abc: applies only to hub repositories, but there is no model.path; leave the key out",
        ),
        ("optim.lr=-1", "optim.lr=-1.0: greater than 0"),
        ("optim.learning_rate=1", "optim.learning_rate: no such key; did you mean optim.lr?"),
        ("max_steps=3", "max_steps: no such key; did you mean optim.steps?"),
        ("data.max_seq_length=3", "data.max_seq_length: no such key; did you mean data.seq_len?"),
        ("evaluation.lengths=[128,256", "evaluation.lengths=[128,256: a bracket is missing: ]"),
        ("launch.environment={A:1", "launch.environment={A:1: a bracket is missing: }"),
        ("name='abc", "name='abc: a quotation mark is not closed"),
        ("launch.envronment.A=1", "launch.envronment.A: no such key; did you mean launch.environment?"),
        ("data.domains.2024.weight=40", "data.domains.2024.weight=40: no such entry yet; add it in a YAML file"),
        (
            "evaluation.lengths=128,256",
            "evaluation.lengths=128,256: several values; a list is written evaluation.lengths=[128,256], "
            "a sweep needs -m",
        ),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(override, line):
    assert line_for(override) == line


def test_an_unknown_experiment_without_a_near_match_lists_all_of_them():
    line = line_for("+experiment=foo")
    assert line.startswith("experiment=foo: no such option; take one of gemma3_4b_clex, ")
    assert line.endswith("tiny_clex or tiny_continued")


def test_a_prefix_of_an_experiment_suggests_its_completions():
    suggested = "llama3_1_8b_clex, llama3_8b_clex or llama3_8b_clex_1m"
    assert line_for("+experiment=llama3") == f"experiment=llama3: no such option; did you mean {suggested}?"


@pytest.fixture
def user_experiment(monkeypatch, tmp_path):
    """Return a function that composes with a user's experiment `mine` of the given text."""
    copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("tests.helpers.composing.CONF", tmp_path / "conf")
    monkeypatch.setattr("clex_train.console.errors.REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)

    def line(text: str) -> str:
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
        return line_for("+experiment=mine")

    return line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [a\nseed: 1\n", "line 3: not valid YAML: expected ',' or ']', but got ':'"),
        ("optim:\n\tlr: 1\n", "line 3: not valid YAML: a tab is no indentation; use spaces"),
        ("optim:\n lr: 1\n  steps: 2\n", "line 4: not valid YAML: mapping values are not allowed here"),
        ("name: a\nname: b\n", "line 3: not valid YAML: found duplicate key name"),
        ("seed: 1\noptim:\n  lrr: 1\n", "line 4: optim.lrr: no such key; did you mean optim.lr?"),
        ("optim:\n  lr: abc\n", "line 3: optim.lr: should be of type float"),
        (
            "scaling:\n  log_scale: off\n",
            "line 3: scaling.log_scale: should be one of off, eval, always, official, token_eval, token (in quotes, in "
            "a YAML file)",
        ),
        ("evaluation:\n  lengths: 5\n", "line 3: evaluation.lengths: should be a list such as [1,2]"),
    ],
)
def test_a_mistake_in_a_users_file_names_file_and_line(user_experiment, text, line):
    assert user_experiment(text).startswith(f"conf/experiment/mine.yaml, {line}")


def test_a_file_that_is_not_utf8_is_named(user_experiment, tmp_path):
    (tmp_path / "conf" / "data" / "latin.yaml").write_bytes("path: corpora/x\n# caf\u00e9\n".encode("latin-1"))
    said = line_for("data=latin")
    assert said == "conf/data/latin.yaml, line 2: not UTF-8; save the file as UTF-8 text"


def test_a_decoding_error_outside_configuration_files_is_not_a_user_mistake(user_experiment):
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xe9".decode("utf-8")
    assert explain(caught.value) is None


@pytest.mark.parametrize("override", ["foo", "optim.lr=1e-4}", "name=${nme}", "model=null", "+model=tiny"])
def test_an_unparsable_override_is_reported_in_one_line(override):
    assert line_for(override)


def test_a_bug_keeps_its_traceback():
    def explanation_of(error: Exception) -> str | None:
        try:
            raise error
        except Exception as caught:
            return explain(caught)

    assert explanation_of(KeyError("x")) is None
    assert explanation_of(RuntimeError("x")) is None
    assert explanation_of(ValueError("data.path=x: not a store")) is None
    assert explanation_of(ConfigError("data.path", "x", "not\n a store")) == "data.path=x: not a store"
    assert explanation_of(ConfigError("data.path", None, "name one")) == "data.path: name one"
    assert explanation_of(BadFile("a.json", "not JSON")) == "a.json: not JSON"


def test_a_bug_exits_1_with_a_traceback_and_a_user_mistake_2_with_one_line(capsys):
    def code_of(error: Exception) -> int:
        try:
            raise error
        except ValueError as caught:
            return program.report(caught)

    assert code_of(ValueError("budget=3: too few")) == program.FAULT
    assert "Traceback" in capsys.readouterr().err
    assert code_of(ConfigError("optim.lr", -1, "greater than 0")) == program.USER_ERROR
    assert capsys.readouterr().err == "error: optim.lr=-1: greater than 0\n"


def test_a_mistake_found_by_a_worker_process_is_reported_the_same_way():
    found = pickle.loads(pickle.dumps(ConfigError("corpus.paths", Path("x.txt"), "not readable")))
    assert (found.key, found.value, found.remedy) == ("corpus.paths", Path("x.txt"), "not readable")
    assert str(found) == "corpus.paths=x.txt: not readable"


def test_each_program_names_the_refused_key_as_its_user_writes_it():
    with pytest.raises(ConfigError, match=r"^store=x: not one$"), renamed_key("data.path", "store"):
        raise ConfigError("data.path", "x", "not one")
    with pytest.raises(ConfigError, match=r"^seed=-1: 0 or more$"), renamed_key("data.path", "store"):
        raise ConfigError("seed", -1, "0 or more")


def _shares(rows: str) -> list[int]:
    return [int(row) for row in rows.split()]


@pytest.mark.parametrize(
    "fault",
    [
        lambda: list(zip([1], [1, 2], strict=True)),
        lambda: _shares("1 x"),
        lambda: "é".encode("ascii"),
        lambda: torch.zeros(2).reshape(3),
        lambda: next(iter(())),
        lambda: [].remove(1),
    ],
)
def test_built_in_errors_raised_by_our_code_are_not_user_mistakes(fault):
    with pytest.raises((ValueError, RuntimeError, StopIteration)) as caught:
        fault()
    assert explain(caught.value) is None


def test_a_refusal_survives_reraising_and_context_managers():
    def refused() -> None:
        with suppress(KeyError):
            try:
                require(False, "engine.x", 1, "not so")
            except ValueError:
                raise

    with pytest.raises(ValueError, match="not so") as caught:
        refused()
    assert explain(caught.value) == "engine.x=1: not so"


def test_a_value_error_from_a_library_is_not_a_user_mistake():
    import numpy as np

    with pytest.raises(ValueError, match="shape") as caught:
        np.broadcast_shapes((2,), (3,))
    assert explain(caught.value) is None


def test_a_revision_is_refused_for_a_local_model(tmp_path):
    line = line_for(f"model.path={tmp_path}", "model.revision=abc")
    where = f"{tmp_path} is a folder on this machine"
    assert line == f"model.revision=abc: applies only to hub repositories, but {where}; leave the key out"
