"""Evaluation inside the training loop: perplexity, and retrieval and measures if configured, of the current weights.

Windows and prompts are chosen once, before training, and scored on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from clex_train.config.checkpoint import OnFullDisk
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.data.bos import evaluation_bos_id, warn_if_bos_differs
from clex_train.evaluation import methods, provenance, results, runner
from clex_train.evaluation import retrieval_runner as retrieval
from clex_train.evaluation.console import tables_of
from clex_train.evaluation.protocols import readings, require_key_tokens_fit, scored_tokens
from clex_train.evaluation.runner import Feeding
from clex_train.evaluation.windows import require_windows, select
from clex_train.measures import plan as measure_plan
from clex_train.measures import runner as measure_runner
from clex_train.measures import tax
from clex_train.models import architecture
from clex_train.retrieval import plan
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import scale_grid
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import check_bos, check_embedding
from clex_train.utils import distributed, log
from clex_train.utils.errors import InputError, require
from clex_train.utils.protocols import Tokenizer

if TYPE_CHECKING:
    from clex_train.models.load import LoadedModel

logger = log.get(__name__)


class TrainingEvaluation:
    """Callable `evaluation(loaded, step)` that returns perplexities and other scores by key. Collective.

    Results are also written to `evaluation/step_<N>.json`. Every rank calls `interrupted` between windows and prompts;
    once it is true on one rank, the call raises `StopRequested` and writes nothing.

    Raises `ConfigError` on creation when no document of `held_out` is as long as the longest window, a protocol's key
    does not fit the lengths, or no prompt of a task or measure fits a length.
    """

    def __init__(
        self,
        config: Config,
        store: TokenStore,
        held_out: TokenStore,
        context_len: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.interrupted: Callable[[], bool] | None = None
        self.config, self.spec = config, config.evaluation
        self.store = held_out
        self.readings = readings(self.spec, context_len)
        bos_id = evaluation_bos_id(self.spec.bos, self.store)
        warn_if_bos_differs(store, bos_id)
        self.windows = select(self.store, max(self.spec.lengths), self.spec.num_windows, bos_id=bos_id)
        require_key_tokens_fit(self.spec, self.readings, self.windows.content, held_out.fingerprint)
        tokens = scored_tokens(self.readings, tax.tax_length(self.spec.lengths, context_len), self.windows)
        tax.require_baseline(self.spec.baseline, tokens, self.windows.content, held_out.fingerprint)
        self.cells = plan.build_cells(self.spec, tokenizer, self.store, bos=bos_id is not None)
        self.forced = measure_plan.build_cells(self.spec, tokenizer, self.store, bos_id=bos_id)

    def __call__(self, loaded: LoadedModel, step: int) -> dict[str, float]:
        # The frequencies have changed since the last evaluation.
        loaded.solve_table()
        with loaded.log_scaled(self.spec.log_scale):
            return self._evaluate(loaded, step)

    def _evaluate(self, loaded: LoadedModel, step: int) -> dict[str, float]:
        tables = methods.model_tables(self.spec, loaded)
        inserted = methods.insertions(self.spec, loaded.model, loaded.context_len)
        scored = runner.evaluate(
            loaded.model,
            loaded.handle,
            tables,
            self.windows,
            self.readings,
            self.spec.chunk_len,
            interrupted=self.interrupted,
            inserted=inserted,
            cache_on_host=self.spec.offload_cache,
        )
        tasks, missing = retrieval.evaluate(
            loaded.model,
            loaded.handle,
            tables,
            self.cells,
            self.spec.chunk_len,
            interrupted=self.interrupted,
            inserted=inserted,
            cache_on_host=self.spec.offload_cache,
        )
        size, device = self.spec.chunk_len, distributed.device()
        feeding = Feeding(size, size, device, self.interrupted, self.spec.offload_cache)
        forced, skipped = measure_runner.evaluate(loaded.model, loaded.handle, tables, self.forced, feeding, inserted)
        # One file for all of them.
        scored = replace(scored, tasks=tasks, measures=forced, missing=[*scored.missing, *missing, *skipped])
        # Before the file is written, so that it has the tax as its metrics do.
        facts = self._facts(next(loaded.model.parameters()).dtype, step)
        scored = tax.add(scored, facts, self.spec.baseline)
        self._keep(scored, facts, step)
        return scored.metrics()

    def _facts(self, dtype: torch.dtype, step: int) -> results.Origin:
        weights = {"path": str(self.config.output_dir), "step": step}
        return provenance.describe(self.config.name, weights, self.store, dtype)

    def _keep(self, scored: results.Results, facts: results.Origin, step: int) -> None:
        """Log the tables and write the file; on a full disk follow `checkpoint.on_full_disk`. Collective."""
        # A step that is repeated after a rollback replaces its own file.
        path = Path(self.config.output_dir) / "evaluation" / f"step_{step}.json"

        def write() -> None:
            logger.info("step %d:\n%s", step, tables_of(scored, facts))
            results.write(path, scored, facts)

        if self.config.checkpoint.on_full_disk is not OnFullDisk["continue"]:
            distributed.write_on_main(write)
        elif (failure := distributed.try_on_main(write)) is not None and distributed.is_main():
            why = distributed.describe_write_error(failure)
            logger.error("%s; training continues without it (checkpoint.on_full_disk=continue)", why)


def warn_of_later(config: Config, store: TokenStore) -> None:
    """Log a warning if the finished run could not be evaluated as configured."""
    # A run without evaluations does not fail for it, but before the start is the time to know.
    try:
        require_windows(held_out(config, store), max(config.evaluation.lengths))
    except InputError as error:
        logger.warning("the finished run cannot be evaluated as configured: %s", error)


def check_methods(config: Config, handle: RotaryHandle) -> None:
    """Raise `ConfigError` for methods and protocols that the trained model does not support."""
    # `handle` needs no weights: this runs before the model is loaded, so that a mistake costs seconds.
    has_clex = config.scaling.name is Method.clex
    readings(config.evaluation, handle.context_len)
    methods.check(config.evaluation, handle, has_clex, scale_grid(config.scaling.t_max) if has_clex else None)


def check_ids(config: Config, held_out: TokenStore, num_rows: int) -> None:
    """Raise `ConfigError` for held-out text with ids beyond the `num_rows` embedding rows of pretrained weights."""
    name = architecture.name(config.model)
    check_embedding(held_out, num_rows, name, "evaluation.path" if config.evaluation.path else "data.path")
    check_bos(evaluation_bos_id(config.evaluation.bos, held_out), num_rows, name)


def held_out(config: Config, store: TokenStore | None) -> TokenStore:
    """Return the documents to evaluate on: those of `evaluation.path`, else the validation split of the only store."""
    path = config.evaluation.path
    if path is None and store is not None:
        return store.split("validation")
    require(path is not None, "evaluation.path", path, "a mixture has no validation split of its own; name a store")
    return TokenStore(str(path)).split("validation")
