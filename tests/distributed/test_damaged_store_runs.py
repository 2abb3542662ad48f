"""A damaged block of the token store on one of two ranks: both exit with code 2, and resume once it is repaired."""

import shutil
from pathlib import Path

import pytest

from clex_train.console import program
from clex_train.data import build
from clex_train.data.rows import Rows
from clex_train.token_store.manifest import BLOCK
from clex_train.token_store.shard_files import DamagedStore
from tests.distributed.distributed_runs import Launcher
from tests.helpers.composing import composed
from tests.helpers.same_models import assert_same_model

OVERRIDES = ("engine.micro_batch=2", "evaluation=never", "checkpoint.every=0", "optim.steps=8", "scaling=clex")
RANKS, BATCH_ROWS, MICRO_BATCH = 2, 8, 2


def flip(tokens: Path, block: int) -> None:
    """Flip a byte of a block; a second call restores it."""
    content = bytearray(tokens.read_bytes())
    content[block * BLOCK] ^= 1
    tokens.write_bytes(content)


def is_readable(rows: Rows, index: int) -> bool:
    try:
        rows[index]
    except DamagedStore:
        return False
    return True


def rank_of_row(index: int) -> int:
    """Return the rank that reads a row: micro batches of two rows go to the ranks in turn."""
    return index // MICRO_BATCH % RANKS


def block_of_rank_1(launcher: Launcher, tokens: Path) -> tuple[int, int]:
    """Find a block that is first read in the third step or later, by rank 1 only; return the block and the step."""
    config = composed(*launcher.program("any", *OVERRIDES)[1:])
    rows = build.build_rows(
        build.pack(build.open_stores(config.data), config.data), config.data, config.seed, BATCH_ROWS
    )
    for block in range(tokens.stat().st_size // BLOCK):
        flip(tokens, block)
        bad = [index for index in range(8 * BATCH_ROWS) if not is_readable(rows, index)]
        flip(tokens, block)
        step = bad[0] // BATCH_ROWS if bad else 0
        if step >= 2 and {rank_of_row(index) for index in bad if index // BATCH_ROWS == step} == {1}:
            return block, step
    raise AssertionError("no such block")


@pytest.mark.slow
def test_a_block_found_damaged_by_one_rank_ends_both_and_the_repaired_run_resumes_bitwise(
    launcher: Launcher, tiny_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny_store, store)
    here = Launcher(tmp_path, store, launcher.architecture)
    (tokens,) = (store / "train").glob("*.tokens")
    block, step = block_of_rank_1(here, tokens)
    assert here.run(RANKS, "undisturbed", *OVERRIDES).returncode == 0
    flip(tokens, block)
    ended = here.run_unsupervised(RANKS, "damaged", *OVERRIDES)
    assert [done.returncode for done in ended] == [program.USER_ERROR] * RANKS, [done.stderr for done in ended]
    errors = [line for done in ended for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: step {step + 1}: {tokens}: damaged, block {block} (from byte {block * BLOCK})")
    assert errors[0].endswith(f"the last checkpoint is {tmp_path / 'damaged' / 'checkpoints' / f'step_{step}'}")
    assert not any("Traceback" in done.stderr for done in ended)
    flip(tokens, block)
    assert here.run(RANKS, "damaged", *OVERRIDES).returncode == 0
    assert_same_model(tmp_path / "undisturbed" / "final", tmp_path / "damaged" / "final")
    assert here.figures("damaged", "loss") == here.figures("undisturbed", "loss")
