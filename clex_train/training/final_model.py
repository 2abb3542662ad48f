"""Write the model of a finished run into `final/`, and recognise a run that has it."""

from functools import partial
from pathlib import Path

from clex_train.adapters import lora, merge
from clex_train.data import conversations
from clex_train.engine import deepspeed as engines
from clex_train.export.final import is_finished as is_whole
from clex_train.export.final import write_final
from clex_train.preflight.run_checks import Inputs, Preflight
from clex_train.tracking import run_folder, saved_config
from clex_train.training.state import Parts
from clex_train.utils import distributed, log

logger = log.get(__name__)


def save(parts: Parts, inputs: Inputs) -> None:
    """Write the weights, with adapters merged, the frequencies of the last step and the tokenizer. Collective."""
    parts.loaded.solve_table()
    config, trained, model = parts.config, parts.trained, parts.loaded.model
    conversations.stop_at_turns(model.generation_config, inputs.stores)
    final, beside = Path(config.output_dir) / saved_config.FINAL, None
    weights, t = engines.consolidated_state_dict(parts.engine), config.scaling.final_t
    if trained is not None:
        if config.adapter.save:
            found = merge.tensors(weights, trained)
            beside = partial(merge.write, model=model, found=found, trained=trained, base=config.model.path)
        weights = merge.merge(weights, trained)
        lora.remove(model)
    write_final(final, parts.loaded, weights, inputs.tokenizer, t, beside)


def is_finished(ready: Preflight) -> bool:
    """Return True if the run is complete and its final model intact; then also tidy the folder. Collective."""
    history, config = ready.history, ready.requested
    if history is None or history.first_step != config.optim.steps:
        return False
    engines.open_process_group(config.engine)
    final = Path(config.output_dir) / saved_config.FINAL
    # A finished run is written again when it is asked for its adapter.
    lacks_adapter = config.adapter.save and not (final / merge.FOLDER).is_dir()
    if not is_whole(final) or distributed.any_rank(lacks_adapter):
        return False
    logger.info("%s is finished: its final model is in %s", config.output_dir, final)

    def tidy() -> None:
        history.checkpoints.tidy()
        history.checkpoints.retire(config.optim.steps)
        run_folder.restore_config(config, history.recorded)

    distributed.write_on_main(tidy)
    return True
