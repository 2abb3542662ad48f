"""Train or fine-tune a model: `deepspeed train.py +experiment=tiny_clex`, or with torchrun, or plain `python train.py`.

`--help` lists every field; `dry_run=true` prints sizes, memory and tokens without weights, data or a GPU.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Before the imports that take seconds, so that Ctrl-C has its one line from the first moment.
    from clex_train.resilience import stop_requests

    stop_requests.listen()

import hydra
from omegaconf import DictConfig

from clex_train.config import root as configuration
from clex_train.console import program
from clex_train.console.help import help_text
from clex_train.utils import log, terminal

if TYPE_CHECKING:
    from clex_train.preflight import out_of_memory


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
@program.task
def main(composed: DictConfig) -> None:
    """Turn what Hydra composed into a checked configuration and run it, or only print its plan."""
    config = configuration.to_config(composed)
    config.output_dir = program.sweep_folder(config.output_dir)
    if config.dry_run:
        from clex_train.preflight.dry_run import print_plan

        print_plan(config)
    else:
        run(config)


def run(config: configuration.Config) -> int:
    """Check every input, build the parts, train, write `final/`; returns the number of optimizer steps taken.

    Raises:
        ConfigError: a mistake of the user, with the key and the remedy, before the model is loaded.
        StopRequested: the run has saved and stopped on request.
        RunStopped: the run cannot continue.
    """
    from clex_train.preflight import out_of_memory
    from clex_train.tracking import run_folder

    opened = run_folder.opened(Path(config.output_dir), patience=60 * config.engine.timeout)
    with opened, out_of_memory.explaining(config) as page:
        return _run(config, page)


@log.buffered()
def _run(config: configuration.Config, page: "out_of_memory.Page") -> int:
    from clex_train.preflight.run_checks import run_checks
    from clex_train.resilience.watchdog import watching
    from clex_train.tracking.tracker import Tracker
    from clex_train.training import final_model, loop
    from clex_train.training.build import build, listen_for_stops
    from clex_train.training.run_setup import open_run

    stop = listen_for_stops(config)
    page.ready = ready = run_checks(config)
    if final_model.is_finished(ready):
        return config.optim.steps
    open_run(ready)
    with watching(60 * config.engine.timeout):
        parts = build(ready, stop)
        try:
            steps = loop.train(parts, partial(Tracker, ready.config, Path(config.output_dir)))
            final_model.save(parts, ready.inputs)
        finally:
            parts.engine.destroy()
    return steps


if __name__ == "__main__":
    terminal.survive_hangup("stdout", "stderr")
    log.setup()
    configuration.register()
    sys.exit(program.run(main, help_text, configuration.Config, kept="training had not begun"))
