"""The console command `clex-train VERB`: dispatch to programs, and quick answers without slow imports."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from clex_train.cli import info, main
from clex_train.utils import versions
from clex_train.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(main.VERBS))
def test_every_verb_names_an_existing_program(name: str) -> None:
    module = main.VERBS[name].module
    found = find_spec(module)
    assert found is not None
    if found.submodule_search_locations:
        assert find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("tran", "error: tran: no such verb; did you mean train?"),
        ("xyzzy", f"error: xyzzy: no such verb; take one of {', '.join(main.VERBS)}"),
    ],
)
def test_an_unknown_verb_is_reported_in_one_line(typed: str, line: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["clex-train", typed])
    assert main.main() == 2
    assert capsys.readouterr().err == line + "\n"


def test_help_lists_every_verb_and_version_prints_the_package_version(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["clex-train"])
    assert main.main() == 0
    help_text = capsys.readouterr().out
    assert all(f"    {name} " in help_text for name in main.VERBS)
    monkeypatch.setattr(sys, "argv", ["clex-train", "--version"])
    assert main.main() == 0
    assert capsys.readouterr().out == f"clex-train {versions.own()}\n"


def test_a_verb_gets_its_arguments_and_ends_with_its_exit_code(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "a_program.py").write_text("import sys\nif __name__ == '__main__': sys.exit(len(sys.argv[1:]) + 40)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(main.VERBS, "try", main.Verb("a_program", "", ("last",)))
    monkeypatch.setattr(sys, "argv", ["clex-train", "try", "one=1"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 42


def test_neither_the_package_nor_its_command_imports_torch() -> None:
    code = "import sys, clex_train, clex_train.cli.main; print({'torch', 'hydra', 'transformers'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "set()"


def test_the_library_is_imported_from_the_package() -> None:
    import clex_train
    from clex_train import api

    assert clex_train.apply_clex is api.apply_clex
    assert clex_train.apply_lm_infinite.__module__ == "clex_train.lm_infinite.install"
    assert clex_train.load_for_evaluation.__module__ == "clex_train.models.load"
    assert {*clex_train.__all__} <= {*dir(clex_train)}
    with pytest.raises(AttributeError, match="no attribute 'apply_klex'"):
        clex_train.apply_klex  # noqa: B018


def test_info_lists_installed_and_missing_packages(monkeypatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda module: None if module == "flash_attn" else object())
    monkeypatch.setattr(info.shutil, "which", lambda tool: None if tool == "sbatch" else tool)
    lines = list(info.lines())
    assert lines[0].startswith(f"clex-train {versions.own()}, commit ")
    assert [line.split()[1].rstrip(":") for line in lines if line.startswith("  missing")] == ["flash-attn", "sbatch"]
    assert len(lines) <= 12


def test_the_documented_shell_completion_has_every_verb() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert f'complete -o default -W "{" ".join(main.VERBS)}" clex-train' in page


def test_info_refuses_an_argument_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(info.sys, "argv", ["info", "foo"])
    with pytest.raises(ConfigError, match="argument=foo: clex-train info takes none"):
        info.main()
