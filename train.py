"""Train or fine-tune a model: `deepspeed train.py +experiment=tiny_clex`, or with torchrun, or plain `python train.py`.

`--help` lists every field; `dry_run=true` prints sizes, memory and tokens without weights, data or a GPU.
"""

import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from clex_train import config as configuration
from clex_train import log, stopping
from clex_train.cli import console
from clex_train.cli.help import help_text


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
@console.task
def main(composed: DictConfig) -> None:
    """Turn what Hydra composed into a checked configuration and run it, or only print its plan."""
    config = configuration.to_config(composed)
    config.output_dir = console.sweep_folder(config.output_dir)
    if config.dry_run:
        from clex_train.dry_run import print_plan

        print_plan(config)
    else:
        run(config)


def run(config: configuration.Config) -> int:
    """Check every input, build the parts, train, write `final/`; returns the number of optimizer steps taken.

    Raises `ValueError` with the key and the remedy for what the user can mend, before the model is loaded.
    """
    from clex_train import distributed, metrics, modeling, run_folder, separation, tracking, trainer
    from clex_train.checkpoint import Checkpoints, Manifest
    from clex_train.data.order import ShuffledRows
    from clex_train.data.packing import ConcatRows
    from clex_train.data.store import TokenStore
    from clex_train.data.vocabulary import check_tokenizer
    from clex_train.engine import deepspeed as engines
    from clex_train.engine.ode_optimizer import OdeOptimizer
    from clex_train.evaluation.training import TrainingEvaluation
    from clex_train.export.final import write_final

    run_dir = Path(config.output_dir)
    run_folder.require_writable(run_dir)
    modeling.check_attention(config.attention.implementation)
    arch = modeling.architecture(config.model)
    store = TokenStore(str(config.data.path))
    tokenizer = modeling.training_tokenizer(config.model, arch, store.tokenizer_path)
    check_tokenizer(store, tokenizer)
    rows = ShuffledRows(ConcatRows(store, config.data.seq_len), config.seed)
    context_len = modeling.context_length(config.model, arch)
    separation.check_document_mask(config, arch, context_len)
    evaluation = TrainingEvaluation(config, store, context_len) if config.evaluation.every >= 0 else None
    configuration.check_reach(config, context_len)
    configuration.check_scaling(config, modeling.has_field(str(config.model.path)))
    settings = engines.deepspeed_dict(config, distributed.world_size())
    identity = Manifest.of_run(config, modeling.architecture_digest(arch), store.fingerprint)
    checkpoints = Checkpoints(run_dir, config.checkpoint.keep_last, identity)
    newest = checkpoints.newest()
    run_folder.check_config(config, newest is not None)
    first_step = newest[1].step if newest else 0
    if first_step == config.optim.steps and (run_dir / "final").exists():
        log.get("clex_train").info("%s is finished: its final model is in %s", run_dir, run_dir / "final")
        return first_step
    if distributed.is_main():
        run_folder.write_config(config)
        tracking.write_environment(run_dir, first_step, store.fingerprint)

    engines.open_process_group(config.engine)
    loaded = modeling.load_for_training(config, arch, engines.precision(config.engine), settings)
    ode = OdeOptimizer(loaded.clex, config.scaling, config.seed) if loaded.clex else None
    engine = engines.build(loaded.model, config)
    flops = metrics.flops_per_token(*modeling.matmul_shape(loaded.model), config.data.seq_len)
    try:
        parts = trainer.Parts(config, engine, loaded, rows, ode, checkpoints, evaluation, flops)
        steps = trainer.train(parts, partial(tracking.Tracker, config, run_dir))
        modeling.solve_table(loaded)
        write_final(run_dir / "final", loaded, engines.consolidated_state_dict(engine), tokenizer)
    finally:
        engine.destroy()
    return steps


if __name__ == "__main__":
    log.setup()
    stopping.listen()
    configuration.register()
    sys.exit(console.run(main, help_text))
