"""`final/`: the trained model as one Hugging Face directory, with the ODE, its table and the tokenizer beside it."""

from pathlib import Path
from typing import Any

import torch

from clex_train import distributed, log, model_directory
from clex_train.files import complete_or_absent
from clex_train.modeling import LoadedModel, bars_on_a_terminal

logger = log.get(__name__)


def write_final(directory: Path, loaded: LoadedModel, state_dict: dict[str, torch.Tensor], tokenizer: Any) -> None:
    """Write a model directory that appears complete or not at all. Rank 0 writes; every rank may call it.

    `state_dict` holds the consolidated weights on rank 0 (`engine.deepspeed.consolidated_state_dict`).
    """
    if distributed.is_main():
        with complete_or_absent(directory) as folder:
            loaded.model.config.use_cache = True
            with bars_on_a_terminal():
                loaded.model.save_pretrained(folder, state_dict=state_dict)
            tokenizer.save_pretrained(folder)
            if loaded.clex is not None:
                assert loaded.table is not None, "solve_table comes first"
                model_directory.write_clex(folder, loaded.clex, loaded.table, loaded.context_len, loaded.log_scale)
        logger.info("the final model is in %s", directory)
    distributed.barrier()
