"""`--help` and docs/configuration.md: complete and up to date with the schema and conf/."""

from clex_train.config.docs import describe
from clex_train.config.root import Config
from clex_train.console import help as cli_help
from tests.helpers.composing import CONF, EXPERIMENTS


def test_help_names_every_key_with_its_default_and_every_experiment_and_option():
    text = cli_help.help_text()
    for key, _, default, _ in describe(Config):
        assert f"  {key}={default}  (" in text
    for name in EXPERIMENTS:
        assert f"\n  {name}" in text
    assert "zero3_offload" in text


def test_every_group_of_conf_is_shown():
    folders = {path.parent.name for path in CONF.glob("*/*.yaml")}
    assert set(cli_help.GROUPS) == folders - {"experiment", "corpus"}


def test_the_page_on_configuration_is_up_to_date():
    page = CONF.parent / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == cli_help.markdown(), (
        "write it again: python -m clex_train.console.help > docs/configuration.md"
    )


def test_help_lines_fit_a_terminal():
    assert max(map(len, cli_help.help_text().splitlines())) <= 120
