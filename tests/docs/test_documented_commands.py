"""Commands in README.md and docs/: existing programs, verbs, keys and options, with valid values."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from clex_train.cli.average import AverageConfig
from clex_train.cli.evaluation_plan import EvaluateConfig
from clex_train.cli.export_arguments import ExportConfig
from clex_train.cli.lm_eval import LmEvalConfig
from clex_train.cli.report import ReportConfig
from clex_train.config import root as configuration
from clex_train.config.root import Config
from clex_train.console import arguments
from clex_train.console.overrides import for_hydra, type_at
from clex_train.generation.arguments import GenerateConfig
from data_prep.__main__ import VERBS, _expand_group_path
from launch import slurm
from tests.helpers.composing import CONF

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "clex_train.cli.average": AverageConfig,
    "clex_train.cli.evaluate": EvaluateConfig,
    "clex_train.cli.lm_eval": LmEvalConfig,
    "clex_train.cli.export": ExportConfig,
    "clex_train.cli.generate": GenerateConfig,
    "clex_train.cli.report": ReportConfig,
}
PROGRAM = re.compile(r"(?:^|\s)(train\.py|launch\.slurm|data_prep|clex_train\.cli\.\w+)\s")
REMARK = re.compile(r"\s#\s.*|\s{3,}\S.*")
ELLIPSIS = ("...", "VERB")


def commands(page: Path) -> list[str]:
    """Return the commands of our programs in code on a page, each from the name of the program on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line[4:] for line in text.splitlines() if line.startswith("    ")]
    lines += [
        re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    # Shell completion is installed by a flag of Hydra whose value only looks like a key.
    found = [(line, PROGRAM.search(line + " ")) for line in lines if " -sc " not in line]
    return [line[match.start(1) :] for line, match in found if match]


def settings(page: Path) -> list[str]:
    """Return each isolated `key=value` with a dotted key in code on a page."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?:'?launch[.=].*)$", text, re.MULTILINE)
    words = [word for span in spans for word in _words(span)]
    return [word for word in words if re.match(r"[+]*[a-z_]+\.[a-z_.0-9]+=", word)]


def _words(line: str) -> list[str]:
    line = REMARK.sub("", re.sub(r"\s+\\?$", "", line))
    try:
        return [word for word in shlex.split(line) if not any(gap in word for gap in ELLIPSIS)]
    except ValueError:
        return []


def _composed(name: str, words: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        OmegaConf.to_container(compose(name, overrides=words))


COMMANDS = [pytest.param(line, id=f"{page.stem}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_are_accepted(line):
    program, *words = _words(line)
    words = [word for word in words if not word.startswith("-")]
    if program == "train.py":
        configuration.register()
        words = [word for word in words if "=" in word]
        _composed("config", for_hydra(Config, words))
    elif program == "launch.slurm":
        slurm.composed([word for word in words if "=" in word])
    elif program == "data_prep" and words:
        schema, _ = VERBS[words[0]]
        ConfigStore.instance().store(name="data_prep_schema", node=schema)
        _composed("data_prep", for_hydra(schema, [_expand_group_path(word) for word in words[1:]]))
    elif program in PROGRAMS:
        arguments.parse(PROGRAMS[program], [word for word in words if "=" in word])


SETTINGS = sorted({word for page in PAGES for word in settings(page)})


@pytest.mark.parametrize("word", SETTINGS)
def test_documented_settings_have_existing_keys(word):
    key, _, value = word.lstrip("+").partition("=")
    schemas = [schema for schema in (Config, *(schema for schema, _ in VERBS.values())) if type_at(schema, key)]
    assert schemas, f"{key}: no such key"
    is_placeholder = re.fullmatch("[A-Z_.]+", value) or ("," in value and value[0] not in "[{")
    if schemas[0] is Config and not is_placeholder:
        configuration.register()
        _composed("config", for_hydra(Config, [word]))
    elif not is_placeholder:
        ConfigStore.instance().store(name="data_prep_schema", node=schemas[0])
        _composed("data_prep", for_hydra(schemas[0], [word]))


def test_commands_and_settings_are_found_on_the_pages():
    assert len(COMMANDS) > 40
    assert len(SETTINGS) > 20
    assert "launch.environment={NCCL_DEBUG:INFO}" in SETTINGS
    assert "corpus.where={meta.redpajama_set_name: RedPajamaBook}" in SETTINGS
