"""The run folder: changed configurations on resume, folders of earlier versions, and locks."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from clex_train.config.root import Config, Resume
from clex_train.models import architecture
from clex_train.tracking import run_folder
from clex_train.utils.errors import InputError
from tests.helpers.composing import composed


def _config(folder, **optim):
    config = Config(output_dir=str(folder))
    for key, value in optim.items():
        setattr(config.optim, key, value)
    return config


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written"):
        run_folder.require_writable(tmp_path / "file" / "run")


def test_a_changed_learning_rate_is_refused_on_resume_and_named(tmp_path):
    run_folder.write_config(_config(tmp_path))
    with pytest.raises(ValueError, match=r"^optim\.lr: differs from .*config\.yaml"):
        run_folder.check_config(_config(tmp_path, lr=1.0), has_checkpoint=True)


def test_keys_that_do_not_affect_results_may_change(tmp_path):
    run_folder.write_config(_config(tmp_path))
    changed = _config(tmp_path)
    changed.evaluation.every, changed.tracking.log_every, changed.checkpoint.keep_last = 5, 7, 3
    changed.launch.nodes, changed.model.config = 9, "elsewhere/the/same"
    run_folder.check_config(changed, has_checkpoint=True)


def test_micro_batches_may_only_change_with_the_number_of_ranks(tmp_path):
    run_folder.write_config(_config(tmp_path))
    changed = _config(tmp_path)
    changed.engine.micro_batch = 4
    run_folder.check_config(changed, has_checkpoint=True, other_ranks=True)
    with pytest.raises(ValueError, match=r"^engine\.micro_batch: differs"):
        run_folder.check_config(changed, has_checkpoint=True)


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path):
    config = _config(tmp_path)
    config.resume = Resume.never
    with pytest.raises(ValueError, match="resume=never"):
        run_folder.check_config(config, has_checkpoint=True)


def test_a_newly_added_key_is_not_a_change(tmp_path):
    config = _config(tmp_path)
    run_folder.write_config(config)
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "max_bad_steps" not in line))
    run_folder.check_config(config, has_checkpoint=True)


# Keys of runs of earlier commits: presets had L and the initial weights, and allow_missing did not exist.
EARLIER = {
    "llama2_7b": {
        "path": "/models/Llama-2-7b-hf",
        "init": "pretrained",
        "config": "conf/model/architectures/llama2_7b",
        "context_len": 4096,
    },
    "tiny": {"path": None, "init": "random", "config": "conf/model/architectures/tiny", "context_len": 128},
}


def _load_earlier(folder, name) -> Config:
    """Return the present configuration of a run whose config.yaml is from an earlier commit."""
    path = [f"model.path={EARLIER[name]['path']}"] if EARLIER[name]["path"] else []
    config = composed(f"model={name}", *path, f"output_dir={folder}", "data.path=corpora/books")
    run_folder.write_config(config)
    file = folder / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["model"] = EARLIER[name] | {"tokenizer": None, "trust_remote_code": False, "revision": None}
    file.write_text(yaml.safe_dump(content))
    return config


@pytest.mark.parametrize("name", EARLIER)
def test_a_run_of_an_earlier_commit_resumes(tmp_path, name):
    config = _load_earlier(tmp_path, name)
    assert (config.model.init, config.model.context_len) == (None, None)
    shown = architecture.stand_in(config.model)
    own = architecture.own_context(shown, architecture.to_read(shown))
    run_folder.check_config(config, has_checkpoint=True, own_context=own)
    run_folder.write_config(config)
    run_folder.check_config(config, has_checkpoint=True, own_context=own)


def test_the_resolved_values_of_an_earlier_run_may_not_change(tmp_path):
    config = _load_earlier(tmp_path, "tiny")
    with pytest.raises(ValueError, match=r"^model\.context_len: differs from"):
        run_folder.check_config(config, has_checkpoint=True, own_context=256)
    config.model.path = "/models/mine"
    with pytest.raises(ValueError, match=r"^model\.init: differs from"):
        run_folder.check_config(config, has_checkpoint=True, own_context=128)


def test_inputs_of_a_run_may_move_and_this_is_reported(tmp_path, caplog):
    config = _config(tmp_path)
    config.model.path, config.data.path, config.model.tokenizer = "/models/base", "/corpora/books", "/models/base"
    config.evaluation.path = "/corpora/held_out"
    run_folder.write_config(config)
    for group, name in (("model", "path"), ("model", "tokenizer"), ("data", "path"), ("evaluation", "path")):
        setattr(getattr(config, group), name, f"/elsewhere{getattr(getattr(config, group), name)}")
    caplog.set_level("INFO", logger="clex_train")
    run_folder.check_config(config, has_checkpoint=True)
    for line in (
        "model.path changed from /models/base to /elsewhere/models/base",
        "data.path changed from /corpora/books to",
    ):
        assert line in caplog.text
    assert len(caplog.records) == 4


def test_a_finished_run_is_not_extended_but_its_model_trained_further(tmp_path):
    run_folder.write_config(_config(tmp_path, steps=100))
    with pytest.raises(ValueError, match=r"^optim\.steps: differs"):
        run_folder.check_config(_config(tmp_path, steps=200), has_checkpoint=True)
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        run_folder.check_config(_config(tmp_path, steps=200), has_checkpoint=True)
    assert str(raised.value) == (
        f"optim.steps=200: {tmp_path} is finished after 100 steps, for which its learning rate was scheduled; train "
        f"its final model on in another output_dir, with model.path={tmp_path / 'final'}"
    )


def _refuse(folder, *files, rank=0):
    with run_folder.left_as_found(folder):
        run_folder.require_writable(folder)
        with run_folder.run_lock(folder, rank, 1.0):
            for name in files:
                (folder / name).write_text("")
            raise InputError("x=1: refused")


def test_a_refused_launch_removes_the_folder_that_it_made(tmp_path):
    with pytest.raises(ValueError, match="refused"):
        _refuse(tmp_path / "runs" / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [0, 1], ids=["the_folder_of_rank_0", "the_folder_of_rank_1"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["0_is_refused_first", "1_is_refused_first"])
def test_refused_ranks_leave_nothing_whichever_rank_made_the_folder(tmp_path, first, order):
    ranks, folder = {}, tmp_path / "mine"
    for rank in (first, 1 - first):
        ranks[rank] = ExitStack()
        ranks[rank].enter_context(run_folder.left_as_found(folder))
        run_folder.require_writable(folder)
        ranks[rank].enter_context(run_folder.run_lock(folder, rank, 1.0))
    refused = InputError("x=1: refused")
    for rank in order:
        assert not ranks[rank].__exit__(InputError, refused, None)
    assert list(tmp_path.iterdir()) in ([], [folder])
    assert not (folder / "locks").exists()


def test_a_rank_refused_alone_keeps_the_locks_of_others(tmp_path):
    with run_folder.run_lock(tmp_path / "mine", 0, 1.0), pytest.raises(ValueError, match="refused"):
        _refuse(tmp_path / "mine", rank=1)
    assert [lock.name for lock in (tmp_path / "mine" / "locks").iterdir()] == ["rank_0"]


def test_a_launch_into_a_folder_in_use_keeps_its_locks(tmp_path):
    with run_folder.run_lock(tmp_path / "mine", 0, 1.0):
        with pytest.raises(ValueError, match="in use by"):
            _refuse(tmp_path / "mine")
        assert [lock.name for lock in (tmp_path / "mine" / "locks").iterdir()] == ["rank_0"]


@pytest.mark.parametrize("name", ["rank_1", ".writable_"])
def test_a_rank_recovers_when_rank_0_removes_its_folder(tmp_path, monkeypatch, name):
    folder, opened = tmp_path / "runs" / "mine", []
    open_file = Path.open

    def open_after_removal(path, *args, **kwargs):
        if path.name.startswith(name) and not opened:
            opened.append(path)
            shutil.rmtree(tmp_path / "runs")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_after_removal)
    run_folder.require_writable(folder)
    with run_folder.run_lock(folder, 1, 0.0):
        assert (folder / "locks" / "rank_1").is_file()
    assert opened


def test_a_refused_launch_keeps_existing_and_new_files(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder, files, left in ((tmp_path / "mine", (), set()), (tmp_path / "new", ("a",), {"a", "locks"})):
        with pytest.raises(ValueError, match="refused"):
            _refuse(folder, *files)
        assert {entry.name for entry in folder.iterdir()} == left
