"""Atomic writes, full disks and checksums of folders, for every library that writes."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clex_train.console import program
from clex_train.utils import checksums, files
from clex_train.utils.errors import disk_error


def _text(folder: Path) -> None:
    (folder / "text").write_text("x" * 300_000)


def _safetensors(folder: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, folder / "model.safetensors")


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={f"w{i}": i for i in range(20_000)}, merges=[])).save(str(folder / "tokenizer.json"))


def _pickle(folder: Path) -> None:
    torch.save(torch.zeros(100_000), folder / "state.pt")


@pytest.mark.parametrize("write", [_text, _safetensors, _tokenizer])
def test_a_folder_without_room_is_named_and_the_old_content_kept(small_disk, write):
    saved = small_disk / "saved"
    with files.atomic_directory(saved) as folder:
        (folder / "old").write_text("old")

    def fill() -> None:
        with files.atomic_directory(saved) as folder:
            write(folder)

    with pytest.raises(OSError, match="No space left on device") as raised:
        fill()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(saved))
    assert {path.name for path in small_disk.rglob("*")} == {"saved", "old"}


def test_a_file_without_room_is_named_and_the_old_content_kept(small_disk):
    path = small_disk / "a.json"
    files.write_atomically(path, "old")
    with pytest.raises(OSError, match="No space left on device") as raised:
        files.write_atomically(path, b"x" * 300_000)
    assert raised.value.filename == str(path)
    assert [entry.name for entry in small_disk.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_report_files_without_room_for_all_keep_the_old_ones(small_disk):
    folder, new = small_disk / "report", small_disk / "new"
    folder.mkdir()
    (folder / "notes").write_text("a user's own")
    files.write_together(folder, {"page": "old", "figure": b"old"})
    for place in (folder, new):
        with pytest.raises(OSError, match="No space left on device") as raised:
            files.write_together(place, {"page": "new", "figure": b"x" * 300_000})
        assert raised.value.filename == str(place / "figure")
    assert not new.exists()
    (folder / f"{files.SAVING}report").mkdir()
    (folder / f"{files.SAVING}report" / "left").write_text("by a kill")
    assert {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} == {
        "notes": "a user's own",
        "page": "old",
        "figure": "old",
    }
    files.write_together(folder, {"page": "new", "other": "new"})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "notes": "a user's own",
        "page": "new",
        "figure": "old",
        "other": "new",
    }


def test_every_program_ends_on_a_full_disk_with_one_line_and_code_3(small_disk, capsys):
    for write in (_text, _safetensors, _tokenizer):
        with pytest.raises(Exception, match=r"No space left|os error 28") as raised:
            write(small_disk)
        assert program.report(raised.value) == program.STOPPED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(": cannot be written (No space left on device); make room and run the same command again")
        for left in small_disk.iterdir():
            left.unlink()


def test_an_error_of_another_kind_is_not_reported_as_a_full_disk():
    assert disk_error(ValueError("no (os error 28) at the end of it")) is None
    assert program._classify(OSError(errno.EIO, "Input/output error"))[0] is None


def test_a_folder_about_to_be_replaced_is_restored(tmp_path):
    for name in ("replaced_final", "saving_final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    files.recover(tmp_path / "final")
    assert {path.name for path in tmp_path.iterdir()} == {"final"}
    assert (tmp_path / "final" / "from").read_text() == "replaced_final"
    (tmp_path / "replaced_final").mkdir()
    files.recover(tmp_path / "final")
    assert (tmp_path / "final" / "from").read_text() == "replaced_final"
    assert {path.name for path in tmp_path.iterdir()} == {"final"}


@pytest.fixture
def listed(tmp_path) -> Path:
    folder = tmp_path / "model"
    (folder / "templates").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "templates/chat.jinja"):
        (folder / name).write_text(name * 50)
    checksums.write(folder)
    (folder / "README.md").write_text("added by a user")
    return folder


def test_any_damage_of_a_listed_folder_is_detected(listed):
    checksums.require_contents(listed)
    for name in ("config.json", "model.safetensors", "templates/chat.jinja", checksums.NAME):
        path, content = listed / name, (listed / name).read_bytes()
        at = content.index(b"s")  # In "files" of the listing, which is invalid without it.
        for damaged in (b"", content[:-2], bytes(len(content)), content[:at] + b"~" + content[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(checksums.Damaged, match=path.name):
                checksums.require_contents(listed)
        path.unlink()
        with pytest.raises(checksums.Damaged, match=path.name):
            checksums.require_contents(listed)
        path.write_bytes(content)
    checksums.require_contents(listed)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_listing_cannot_name_files_outside_the_folder(listed, name):
    text = (listed / checksums.NAME).read_text()
    (listed / checksums.NAME).write_text(text.replace("config.json", name))
    with pytest.raises(checksums.Damaged, match="names a file outside"):
        checksums.require_sizes(listed)


@pytest.mark.parametrize("place", ["pipe", "link", "dangling"])
def test_a_listing_or_listed_file_that_is_not_a_regular_file_counts_as_damage(listed, place):
    for name in (checksums.NAME, "config.json"):
        (listed / name).rename(listed.parent / name)
        if place == "pipe":
            os.mkfifo(listed / name)
        else:
            (listed / name).symlink_to("/dev/zero" if place == "link" else listed.parent / "nothing")
        assert checksums.exists(listed)
        with pytest.raises(checksums.Damaged, match=name):
            checksums.require_contents(listed)
        (listed / name).unlink()
        (listed.parent / name).rename(listed / name)
    checksums.require_contents(listed)


def test_new_folders_are_flushed_with_their_names(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_directory", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    assert os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../x", "/x", "a\nb", "a\x00b", "x" * 201])
def test_a_name_that_is_not_plain_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^label=.*: a use: a plain name of 1 to 200 bytes") as refusal:
        files.require_plain_name("label", name, "a use")
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["x", "2024 (1)", "caf\u00e9", "...", "x" * 200])
def test_a_plain_name_is_accepted(name):
    files.require_plain_name("label", name, "a use")


def test_an_unusable_output_path_is_refused_without_creating_anything(tmp_path):
    (tmp_path / "file").touch()
    for place, reason in (
        (tmp_path / "file" / "x", "file is a file, not a folder"),
        (Path("/proc/nope/x"), r"/proc (is read-only|cannot be written to \(.*\))"),
        (tmp_path / ("x" * 256), "a name of more than 255 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^output={place}: .*{reason}"):
            files.require_writable_folder("output", place, place.parent)
    files.require_writable_folder("output", tmp_path / "a" / "b" / "c", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
