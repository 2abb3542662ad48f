"""Reading config.yaml and other records of a run folder as data: typed, bounded, never interpolated."""

import os
import time
from pathlib import Path

import pytest

from clex_train.cli.loading import run_config
from clex_train.config.root import Config
from clex_train.tracking import run_folder, saved_config
from clex_train.utils.files import BadFile, open_regular, read_regular
from clex_train.utils.log import printable
from clex_train.utils.records import read_json, read_yaml, require_bounded
from tests.helpers.composing import composed

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    run_folder.write_config(Config(output_dir=str(tmp_path)))
    return tmp_path


def _append(run: Path, old: str, new: str) -> None:
    path = run / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_recorded_text_is_never_interpolated(run: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    _append(run, "name: run", r"name: '${oc.env:A_SECRET} \${x} \\${y} ${'")
    _append(run, "data:\n  path: null", "data:\n  path: ${oc.env:A_SECRET}")
    config = run_config(run)
    assert config.name == r"${oc.env:A_SECRET} \${x} \\${y} ${"
    assert config.data.path == "${oc.env:A_SECRET}"
    caplog.set_level("INFO", logger="clex_train")
    run_folder.check_config(Config(output_dir=str(run)), has_checkpoint=True)
    assert "data.path changed from ${oc.env:A_SECRET} to None" in caplog.text
    assert "hunter2" not in caplog.text


def test_the_command_line_still_interpolates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE", "/corpora/books")
    config = composed("+experiment=tiny_base", "data.path=${oc.env:MY_STORE}")
    assert config.data.path == "/corpora/books"


@pytest.mark.parametrize("experiment", ["tiny_clex", "llama2_7b_clex", "study_base"])
def test_a_recorded_configuration_reads_back_equal(tmp_path: Path, experiment: str) -> None:
    config = composed(f"+experiment={experiment}", f"output_dir={tmp_path}", "model.path=/models/base")
    run_folder.write_config(config)
    assert saved_config.read(tmp_path / "config.yaml") == config


def test_a_yaml_alias_bomb_is_refused_at_once(run: Path) -> None:
    (run / "config.yaml").write_text(BOMB)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"config\.yaml: .*expands to more than 50,000 values"):
        run_config(run)
    with pytest.raises(ValueError, match="expands to more than"):
        run_folder.check_config(Config(output_dir=str(run)), has_checkpoint=True)
    with pytest.raises(BadFile, match="expands to more than"):
        require_bounded(BOMB, run)
    assert time.monotonic() - start < 5


def test_a_recursive_alias_is_refused_and_a_plain_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a [1, *a]")
    with pytest.raises(BadFile, match="contains an alias to its own parent"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("a: &a {x: 1e-5, y: 2024-01-05}\nb: *a\n")
    assert read_yaml(tmp_path / "b.yaml")["b"] == {"x": 1e-5, "y": "2024-01-05"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: run", "name: run\nnope: 1", "Key 'nope' not in 'Config'"),
        ("name: run", "optim: 3", "should be `key: value` lines"),
        ("seed: 0", "seed: [1]", "not the configuration of a run"),
        ("seed: 0", "seed: -1", "seed=-1"),
        ("seed: 0", "seed: 0\n\x00", "not valid YAML"),
    ],
)
def test_a_damaged_configuration_is_reported_in_one_line_with_its_file(
    run: Path, old: str, new: str, message: str
) -> None:
    _append(run, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        run_config(run)
    assert str(caught.value).startswith(str(run / "config.yaml"))
    assert "\n" not in str(caught.value)


def test_only_regular_files_of_the_folder_are_opened(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("secret")
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to(outside)
    (folder / "file").write_text("{}")
    (folder / "inner").symlink_to("file")
    for name, message in {
        "pipe": "not a regular file",
        "zero": "leads out of",
        "loop": "cannot be read",
        "link": "leads out of",
        ".": "not a regular file",
        "file/below": "cannot be read",
    }.items():
        with pytest.raises(BadFile, match=message):
            open_regular(folder / name, within=folder)
    with pytest.raises(BadFile, match="not a regular file"):
        open_regular(folder / "zero")
    assert read_json(folder / "inner", within=folder) == {}
    with pytest.raises(BadFile, match="larger than 1 bytes"):
        read_regular(folder / "file", most=1)


def test_control_characters_are_printed_as_escapes() -> None:
    assert printable("a\x1b[31m\rb\u202ec\x9b\td\ne") == r"a\x1b[31m\rb\u202ec\x9b" + "\td\ne"
    assert printable("café 橋 ±") == "café 橋 ±"
