"""`final/`: the trained model as a Hugging Face directory, with the ODE, its table and the tokenizer.

Its config.json states the model at one t for programs without CLEX, by default t_max, which serves every length. Where
no config.json can state it, they refuse to build the model. `clex.json` keeps the RoPE of the base, from which this
program starts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from clex_train.export.factors import Source
from clex_train.export.model_card import average_card, final_card
from clex_train.export.record import CARD
from clex_train.export.stated_config import config_at
from clex_train.model_config.rope_keys import rope_of
from clex_train.models import directory as model_directory
from clex_train.models import weight_files
from clex_train.models.load import LoadedModel, bars_on_a_terminal
from clex_train.rope import recipes
from clex_train.utils import checksums, distributed, log
from clex_train.utils.errors import ConfigError, InputError, first_line
from clex_train.utils.files import BadFile, atomic_directory
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.records import read_json

logger = log.get(__name__)

LARGEST = 2**28
"""Largest JSON file of a model that is read, such as tokenizer.json, in bytes."""


def write_final(
    directory: Path,
    loaded: LoadedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    t: float | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory atomically. Rank 0 writes; collective.

    `state_dict` has the consolidated weights on rank 0 (`engine.deepspeed.consolidated_state_dict`), `t` is what
    config.json states, by default t_max; `beside` writes more files into the new directory. Raises `RunStopped` on
    every rank when it cannot be written; the run's checkpoints still have everything.
    """
    distributed.write_on_main(lambda: write(directory, loaded, state_dict, tokenizer, t, beside=beside))


def write(
    directory: Path,
    loaded: LoadedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: Tokenizer,
    t: float | None,
    averaged: Sequence[int] = (),
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model directory atomically in this process; `averaged` are the steps whose mean the weights are."""
    with atomic_directory(directory) as folder:
        # Off during training. A saved `false` would make generation slow for every later user of the directory.
        loaded.model.config.use_cache = True
        with bars_on_a_terminal():
            loaded.model.save_pretrained(folder, state_dict=state_dict)
        tokenizer.save_pretrained(folder)
        if averaged:
            (folder / CARD).write_text(average_card(averaged), encoding="utf-8")
        if loaded.clex is not None:
            _write_clex(folder, loaded, t, averaged)
        if loaded.static is not None:
            # The config of the run states the start, from which a resumed run would begin again.
            recipes.with_learned(loaded.model.config, loaded.static.moved().detach()).save_pretrained(folder)
        if beside is not None:
            beside(folder)
        # Last, so that the checksums cover all files.
        checksums.write(folder)
    logger.info("saved the %s model to %s", "averaged" if averaged else "final", directory)


def _write_clex(folder: Path, loaded: LoadedModel, t: float | None, averaged: Sequence[int]) -> None:
    """Add the field, and replace config.json, which has the RoPE of the base, by that of one t."""
    assert loaded.clex is not None
    assert loaded.table is not None, "solve_table comes first"
    config, stated = state(loaded, t)
    stated["averaged"] = list(averaged) or None
    config.save_pretrained(folder)
    if stated["unstated"]:
        model_directory.refuse_elsewhere(folder)
    model_directory.write_clex(folder, loaded.clex, loaded.table, loaded.context_len, loaded.log_scale, stated)
    (folder / CARD).write_text(final_card(loaded.context_len, stated), encoding="utf-8")


def state(loaded: LoadedModel, t: float | None = None) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return the config of the model at `t`, else the base's, and what `clex.json` records about it; None is t_max."""
    assert loaded.table is not None
    t = t or loaded.table.t_max
    base: Any = loaded.model.config
    recorded = {"base_rope": rope_of(base), "stated_t": t, "unstated": None, "lambda_mask": loaded.lambda_mask}
    source = Source(base, loaded.handle, loaded.context_len, loaded.clex, loaded.table, loaded.log_scale)
    try:
        if loaded.lambda_mask:
            raise ConfigError("attention.lambda_mask", "true", "no other program has LM-Infinite's mask")
        # Weights that came with code of their own have run it in this process already.
        return config_at(source, t, trust_remote_code=hasattr(base, "auto_map")), recorded
    except InputError as refusal:
        reason = first_line(refusal)
        logger.warning("final/: only clex_train reads this model, other programs refuse it (%s)", reason)
        return base, recorded | {"stated_t": None, "unstated": reason}


def is_finished(directory: Path) -> bool:
    """Return True if `final/` holds an intact model; log the damage if not. Rank 0 reads; collective."""
    # Every byte is hashed: 14 GB take half a minute on one rank, in a launch that has nothing else to do.
    reason = distributed.broadcast_object(_why_damaged(directory) if distributed.is_main() else None)
    if reason is not None and directory.exists() and distributed.is_main():
        logger.warning("%s is damaged: %s; rewriting it from the last checkpoint", directory, reason)
    return reason is None


def _why_damaged(directory: Path) -> str | None:
    if not directory.is_dir():
        return "it is missing"
    try:
        if checksums.exists(directory):
            checksums.require_contents(directory)
        else:
            _require_readable(directory)
    except checksums.Damaged as damaged:
        return str(damaged)
    return None


def _require_readable(directory: Path) -> None:
    """Raise `Damaged` for unreadable JSON files or headers of weights."""
    # All that can be checked in a directory of an earlier version, which wrote no checksums.
    for path in sorted(directory.glob("*.json")):
        try:
            read_json(path, most=LARGEST)
        except (FileNotFoundError, BadFile) as error:
            raise checksums.Damaged(f"{path.name} is not JSON") from error
    try:
        for path in {*weight_files.files(directory), *directory.glob("*.safetensors")}:
            weight_files.header(path)
    except InputError as error:
        raise checksums.Damaged(first_line(error)) from error
