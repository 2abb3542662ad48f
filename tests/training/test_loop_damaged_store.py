"""A damaged block of the token store in the middle of a run: one line, a checkpoint of the previous step, resuming."""

import shutil
from pathlib import Path

import pytest

import train
from clex_train.console import program
from clex_train.token_store.manifest import BLOCK
from clex_train.token_store.shard_files import DamagedStore
from clex_train.training import loop
from tests.helpers.composing import composed
from tests.helpers.same_models import assert_same_model


def _flip_every_block(folder: Path) -> None:
    for path in folder.glob("train/*.tokens"):
        content = bytearray(path.read_bytes())
        content[::BLOCK] = bytes(byte ^ 1 for byte in content[::BLOCK])
        path.write_bytes(content)


def test_a_run_that_reads_a_damaged_block_saves_and_resumes_bitwise(
    tmp_path: Path, tiny_store: Path, tiny_architecture: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)

    def start(name: str) -> Path:
        overrides = [
            f"output_dir={tmp_path / name}",
            f"data.path={store}",
            f"model.config={tiny_architecture}",
            "model.context_len=32",
            "data.seq_len=32",
            "evaluation=never",
            "scaling=clex",
            "optim.batch_rows=2",
            "optim.steps=8",
        ]
        train.run(composed("+experiment=tiny_base", *overrides))
        return tmp_path / name / "final"

    undisturbed = start("undisturbed")
    step = loop.train_step

    def damaging(parts, number, micro_batches):
        if number == 3:
            _flip_every_block(store)
        return step(parts, number, micro_batches)

    with monkeypatch.context() as damaged:
        damaged.setattr(loop, "train_step", damaging)
        with pytest.raises(DamagedStore) as caught:
            start("damaged")
    line = str(caught.value)
    # Two steps had been read: the one during which the damage was done, and the prefetched one.
    (saved,) = (tmp_path / "damaged" / "checkpoints").glob("step_*")
    assert line.startswith(f"step {int(saved.name.removeprefix('step_')) + 1}: {store}/train/")
    assert "fails its checksum; copy the store again or tokenize again; the last checkpoint is" in line
    assert str(saved) in line
    assert program.report(caught.value) == program.USER_ERROR
    assert capsys.readouterr().err.endswith(f"error: {line}\n")
    _flip_every_block(store)
    repaired = start("damaged")
    assert_same_model(undisturbed, repaired)
