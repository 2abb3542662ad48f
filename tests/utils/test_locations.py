"""Finding the files of the program, its commit and its version from any folder."""

import subprocess
import sys
from pathlib import Path

from clex_train.config.model import ModelConfig
from clex_train.models import architecture
from clex_train.tracking import environment
from clex_train.utils import locations, versions

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkout_has_its_files_next_to_the_package() -> None:
    assert locations.IS_CHECKOUT
    assert ROOT == locations.ROOT
    assert locations.TRAIN.is_file()
    assert (locations.CONF / "config.yaml").is_file()


def test_a_shipped_architecture_is_found_from_another_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert architecture.to_train(ModelConfig(config="conf/model/architectures/tiny")).model_type == "llama"


def test_the_commit_of_a_copy_is_the_recorded_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locations, "COMMIT", tmp_path / "COMMIT")
    (tmp_path / "COMMIT").write_text("abc-dirty\n")
    assert environment.git_commit() == "abc-dirty"


def test_an_installed_package_ignores_the_commit_of_an_enclosing_repository(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locations, "COMMIT", tmp_path / "COMMIT")
    monkeypatch.setattr(locations, "IS_CHECKOUT", False)
    assert environment.git_commit() is None


def test_the_version_is_that_of_the_running_code() -> None:
    assert f'version = "{versions.own()}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_training_plans_a_run_from_another_folder(tmp_path: Path) -> None:
    """Use `model=tiny`, an architecture in the checkout and not in the current folder."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "model=tiny", "dry_run=true"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "conf/model/architectures/tiny" in done.stdout
