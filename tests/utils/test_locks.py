"""File locks, and the warning on file systems that do not support them."""

import errno
import fcntl
from pathlib import Path

import pytest

from clex_train.engine import extensions
from clex_train.tracking import run_folder
from clex_train.utils.locks import Lock, try_lock
from data_prep.resume import open_partial


def test_only_the_first_of_several_ranks_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for rank in ("0", "1", "10"):
        monkeypatch.setenv("RANK", rank)
        with (tmp_path / "lock").open("w") as file:
            assert try_lock(file, tmp_path / "lock", "-") is Lock.unsupported
    assert len(caplog.records) == 1


def test_a_lock_is_busy_until_its_owner_releases_it(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert try_lock(first, tmp_path / "lock", "-") is Lock.taken
        assert try_lock(second, tmp_path / "lock", "-") is Lock.busy
        first.close()
        assert try_lock(second, tmp_path / "lock", "-") is Lock.taken


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_gives_a_warning_and_work_continues(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_partial(tmp_path / "store", {"a": 1}, overwrite=False) as partial:
        assert partial.is_dir()
    with run_folder.run_lock(tmp_path / "run", rank=0, patience=0):
        pass
    with extensions.exclusive(tmp_path / "op.flock", "op") as is_held:
        assert not is_held, "torch's own lock may be another process's, which must not be removed"
    assert caplog.text.count("this file system has no locks (not here)") == 3
