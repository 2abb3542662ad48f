"""Overrides of text fields keep the text as typed, despite Hydra and YAML; mappings accept new names."""

import sys
from dataclasses import dataclass, field
from shutil import copytree

import pytest
from omegaconf.errors import ValidationError

from clex_train.cli.evaluation_plan import EvaluateConfig
from clex_train.cli.export_arguments import ExportConfig, Scaling
from clex_train.cli.lm_eval import LmEvalConfig
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale
from clex_train.console import arguments, program
from clex_train.console.overrides import for_hydra
from data_prep.config import DecontaminateVerb, TokenizeVerb
from launch import slurm
from tests.helpers.composing import CONF, composed

TEXTS = [
    "2024_01_05",
    "1e3",
    "1234e10",
    "no",
    "true",
    "off",
    "0x10",
    "010",
    "10:30:00",
    ".5",
    "nan",
    "a=b",
    "a, b",
    "-1",
]
ATOMS = [text for text in TEXTS if text not in ("a=b", "a, b")]


@pytest.mark.parametrize("text", [*TEXTS, "it's (1)", "[a", "x{y}", "caf\u00e9", " lead"])
def test_text_is_kept_as_typed(text):
    assert composed(f"name={text}").name == text
    assert arguments.parse(EvaluateConfig, [f"label={text}"]).label == text


@pytest.mark.parametrize("text", ATOMS)
def test_text_in_lists_and_mappings_is_kept_as_typed(text):
    config = composed(f"launch.modules=[a,{text}, {text}]", f"launch.environment={{A: {text},B:x}}")
    assert config.launch.modules == ["a", text, text]
    assert config.launch.environment == {"A": text, "B": "x"}
    assert composed(f"launch.environment.A={text}").launch.environment == {"A": text}
    domains = composed("data.path=null", f"data.domains={{a: {{path: {text}, weight: 2}}}}", "evaluation=never")
    assert domains.data.domains["a"].path == text


@pytest.mark.parametrize(
    ("override", "name"),
    [("name='1e3'", "1e3"), ('name="a b"', "a b"), ("name=run_${seed}", "run_0"), (r"name=a\,b", "a,b")],
)
def test_quoted_escaped_and_interpolated_text_is_unchanged(override, name):
    assert composed(override).name == name


def test_null_and_numbers_keep_their_types():
    config = composed("model.revision=null", "optim.lr=1e-4", "evaluation.lengths=[128,256]", "launch.memory=0")
    assert (config.model.revision, config.optim.lr, config.launch.memory) == (None, 1e-4, "0")
    assert config.evaluation.lengths == [128, 256]


def test_a_sweep_over_text_splits_at_commas():
    assert for_hydra(Config, ["-m", "name=1e3,no", "seed=1,2"]) == ["-m", "name='1e3','no'", "seed=1,2"]


def test_spaces_around_the_texts_of_a_sweep_are_stripped():
    assert for_hydra(Config, ["--multirun", "name=a, 1e3 ,'b, c'"]) == ["--multirun", "name='a','1e3','b, c'"]
    assert for_hydra(Config, ["-m", "name= lead"]) == ["-m", "name=' lead'"]


@pytest.mark.parametrize("mode", ["hydra.mode=MULTIRUN", "++hydra.mode=MULTIRUN", "hydra.mode=RunMode.MULTIRUN"])
def test_a_sweep_may_be_requested_by_hydras_own_key(mode):
    assert for_hydra(Config, [mode, "name=a,b"]) == [mode, "name='a','b'"]
    assert for_hydra(Config, ["hydra.mode=RUN", "name=a,b"]) == ["hydra.mode=RUN", "name='a,b'"]


def test_a_sweep_takes_new_domains_by_single_keys():
    new = ["data.domains.new.path=x", "data.domains.new.weight=3"]
    given = for_hydra(Config, ["-m", *new, "optim.lr=1e-4,2e-4"])
    assert given[1:3] == ["++data.domains={new:{path:'x'}}", "++data.domains={new:{weight:3}}"]
    for value in ("1,2", "choice(1,2)", "range(1,3)"):
        assert (
            for_hydra(Config, ["-m", f"data.domains.book.weight={value}"])[1] == f"++data.domains.book.weight={value}"
        )


@pytest.mark.parametrize("name", ["2024", "true", "null", "nan", "1_0"])
def test_a_domain_keeps_a_name_that_hydra_would_read_as_another_type(user_mixture, name):
    config = user_mixture(name, f"data.domains.{name}.weight=40")
    assert config.data.domains[name].weight == 40
    assert config.data.domains[name].path == "x"


def test_verbs_of_data_prep_keep_text_as_typed():
    assert for_hydra(TokenizeVerb, ["corpus.where={language: no}"]) == ["++corpus.where={language:'no'}"]
    assert for_hydra(DecontaminateVerb, ["evaluation.path=1e3", "ngrams=[2,3]"]) == [
        "evaluation.path='1e3'",
        "ngrams=[2,3]",
    ]


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_mapping_takes_new_names_with_and_without_plus_signs(plus):
    config = composed(
        "data=longcorpus",
        f"{plus}data.domains.new={{path: x, weight: 1}}",
        "evaluation=never",
        "launch=h100_infiniband",
    )
    assert config.data.domains["new"].weight == 1
    assert composed("launch=h100_infiniband", f"{plus}launch.environment.A=b").launch.environment == {
        "NCCL_IB_HCA": "mlx5",
        "A": "b",
    }
    weights = composed("data=longcorpus", f"{plus}data.weights_at={{5: {{book: 10}}}}", "evaluation=never")
    assert weights.data.weights_at == {5: {"book": 10}}


def test_overriding_one_field_of_a_domain_keeps_the_others():
    config = composed("data=longcorpus", "data.domains.book.weight=7", "evaluation=never")
    assert config.data.domains["book"].weight == 7
    assert config.data.domains["book"].path is not None


@pytest.fixture
def user_mixture(tmp_path, monkeypatch):
    """Return a function that composes with a user's mixture of one domain with the given name."""

    def compose(name: str, *overrides: str) -> Config:
        copytree(CONF, tmp_path / "conf")
        monkeypatch.setattr("tests.helpers.composing.CONF", tmp_path / "conf")
        (tmp_path / "conf" / "data" / "mine.yaml").write_text(f'path: null\ndomains:\n  "{name}": {{path: x}}\n')
        return composed("data=mine", "evaluation=never", *overrides)

    return compose


@pytest.fixture
def launch_with_option(tmp_path, monkeypatch):
    """Return a function that runs the launcher with a user's `launch` option of the given text."""

    def line(text: str, capsys) -> tuple[int, str]:
        (tmp_path / "launch").mkdir(exist_ok=True)
        (tmp_path / "launch" / "mine.yaml").write_text(f"# A test.\n{text}")
        words = ["launch.slurm", "--dry-run", "launch=mine", f"hydra.searchpath=[file://{tmp_path}]"]
        monkeypatch.setattr(sys, "argv", words)
        code = program.run(slurm.main, slurm.usage)
        return code, capsys.readouterr().err

    return line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("environment: {A: 1e3}\n", 'line 2: launch.environment.A: YAML reads 1e3 as 1000.0; write "1e3"'),
        ("time: 23:30:00\n", "line 2: launch.time: YAML reads 23:30:00 as 84600"),
        ("account: no\n", "line 2: launch.account: YAML reads no as False"),
        ("modules:\n  - a\n  - 1_0\n", "line 4: launch.modules.1: YAML reads 1_0 as 10"),
    ],
)
def test_text_that_yaml_would_change_is_refused_with_advice_to_quote_it(launch_with_option, capsys, text, line):
    code, said = launch_with_option(text, capsys)
    assert code == 2
    assert f"mine.yaml, {line}" in said
    assert len(said.splitlines()) == 1


def test_text_that_yaml_leaves_unchanged_is_accepted(launch_with_option, capsys):
    assert launch_with_option("memory: 0\nenvironment: {A: 1, B: '1e3'}\nqos: null\n", capsys) == (0, "")


def test_a_lone_folder_is_read_as_a_run_or_a_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "model").mkdir()
    for schema in (EvaluateConfig, LmEvalConfig, ExportConfig):
        run, model = (arguments.parse(schema, [str(tmp_path / name)]) for name in ("run", "model"))
        assert (run.run, run.model) == (str(tmp_path / "run"), None)
        assert (model.run, model.model) == (None, str(tmp_path / "model"))
    assert arguments.parse(EvaluateConfig, ["runs/gone"]).run == "runs/gone"
    assert arguments.parse(EvaluateConfig, ["owner/name"]).model == "owner/name"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runs/a", "runs/b"], "runs/a runs/b: name one run folder or model"),
        (["verbose"], "verbose: arguments have the form key=value"),
        (["--verbose"], "--verbose: arguments have the form key=value"),
    ],
)
def test_a_lone_word_that_is_not_a_folder_is_refused(words, line):
    with pytest.raises(ValueError, match=line):
        arguments.parse(EvaluateConfig, words)


@dataclass
class Choices:
    one: LogScale | None = None
    several: list[LogScale] = field(default_factory=list)


def test_choices_that_yaml_reads_as_booleans_are_restored():
    """Restore the `off` that YAML reads as false, alone and in lists; leave null and other values unchanged."""
    parsed = arguments.parse(Choices, ["one=off", "several=[eval, off,official]"])
    assert parsed == Choices(LogScale.off, [LogScale.eval, LogScale.off, LogScale.official])
    assert arguments.parse(ExportConfig, ["log_scale=off"]).log_scale is Scaling.off
    assert arguments.parse(ExportConfig, ["log_scale=off", "log_scale=null"]).log_scale is None
    assert composed("scaling.log_scale=off").scaling.log_scale is LogScale.off
    with pytest.raises(ValidationError, match="expected one of"):
        arguments.parse(ExportConfig, ["log_scale=no"])
    assert for_hydra(Config, ["-m", "scaling.log_scale=off, eval"])[1] == "scaling.log_scale='off','eval'"
