"""`final/`: the trained model as one Hugging Face directory, with the ODE, its table and the tokenizer beside it."""

import shutil
from pathlib import Path
from typing import Any

import torch

from clex_train import distributed, log, model_directory
from clex_train.config import ScalingConfig
from clex_train.modeling import LoadedModel

logger = log.get(__name__)


def write_final(
    directory: Path, loaded: LoadedModel, state_dict: dict[str, torch.Tensor], tokenizer: Any, scaling: ScalingConfig
) -> None:
    """Write a model directory that appears complete or not at all. Rank 0 writes; every rank may call it.

    `state_dict` holds the consolidated weights on rank 0 (`engine.deepspeed.consolidated_state_dict`).
    """
    if distributed.is_main():
        beside = directory.with_name("saving_" + directory.name)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        loaded.model.config.use_cache = True
        loaded.model.save_pretrained(beside, state_dict=state_dict)
        tokenizer.save_pretrained(beside)
        if loaded.clex is not None:
            assert loaded.table is not None, "solve_table comes first"
            model_directory.write_clex(beside, loaded.clex, loaded.table, loaded.context_len, scaling)
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)
        logger.info("the final model is in %s", directory)
    distributed.barrier()
