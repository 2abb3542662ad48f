"""Write the model of a finished run into `final/`, and recognise a run that has it."""

from pathlib import Path

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
    """Write the weights, the frequencies of the last step and the tokenizer. Collective."""
    parts.loaded.solve_table()
    conversations.stop_at_turns(parts.loaded.model.generation_config, inputs.stores)
    final = Path(parts.config.output_dir) / saved_config.FINAL
    weights, t = engines.consolidated_state_dict(parts.engine), parts.config.scaling.final_t
    write_final(final, parts.loaded, weights, inputs.tokenizer, t)


def is_finished(ready: Preflight) -> bool:
    """Return True if the run is complete and its final model intact; then also tidy the folder. Collective."""
    history, config = ready.history, ready.requested
    if history is None or history.first_step != config.optim.steps:
        return False
    engines.open_process_group(config.engine)
    final = Path(config.output_dir) / saved_config.FINAL
    if not is_whole(final):
        return False
    logger.info("%s is finished: its final model is in %s", config.output_dir, final)

    def tidy() -> None:
        history.checkpoints.tidy()
        history.checkpoints.retire(config.optim.steps)
        run_folder.restore_config(config, history.recorded)

    distributed.write_on_main(tidy)
    return True
