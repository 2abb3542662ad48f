"""Out of memory: print the memory of each rank and the settings to reduce, instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch

from clex_train.config.engine import EngineConfig, Offload
from clex_train.config.root import Config
from clex_train.preflight.memory_plan import Plan, make_plan, memory_table
from clex_train.preflight.run_checks import Preflight, Scope, run_checks
from clex_train.utils import distributed
from clex_train.utils.errors import InputError, RunStopped, first_line, is_out_of_memory

STATE, ROWS = ("parameters", "gradients", "optimizer"), ("activations", "logits")


@dataclass
class Page:
    """Input of the message of `explaining`; the caller adds the result of the checks once they have passed."""

    ready: Preflight | None = None


@contextmanager
def explaining(config: Config) -> Iterator[Page]:
    """Turn an error of a full GPU or host memory inside into a `RunStopped` with the estimate and the remedies."""
    page = Page()
    try:
        yield page
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunStopped(explain(config, error, page.ready)) from error


def explain(config: Config, error: BaseException, ready: Preflight | None = None) -> str:
    """Compose the message: the failing rank, the estimate per part, and the remedies with the most effect first.

    `ready` is the result of the run's checks; without it they are run for a plan.
    """
    what = f"out of memory on rank {distributed.rank()}: {first_line(error)}"
    try:
        plan = make_plan(ready or run_checks(config, Scope.plan))
    except InputError as refused:
        return f"{what}\n(no estimate: {refused})\nturn down: {'; '.join(_rows(config))}"
    ways = (*_rows(config, plan), *_state(config))
    if _share(plan, STATE) > _share(plan, ROWS):
        ways = (*_state(config), *_rows(config, plan))
    return "\n".join(
        (
            f"{what}; the checkpoints are intact",
            *memory_table(plan),
            f"turn down, most effect first: {'; '.join(ways)}",
            "dry_run=true shows the estimate of any change without a GPU",
        )
    )


def _share(plan: Plan, names: tuple[str, ...]) -> float:
    """Return the peak over the moments of the bytes of the named parts together."""
    most: float = max(
        sum(moment) for moment in zip(*(part.device for part in plan.parts if part.name in names), strict=True)
    )
    return most


def _rows(config: Config, plan: Plan | None = None) -> Iterator[str]:
    """Yield remedies for activations and logits, those for the larger of the two first."""
    engine = config.engine
    if engine.micro_batch is None:
        readers = distributed.world_size() // engine.sequence_parallel
        yield f"engine.micro_batch=1 (instead of a rank's {config.optim.batch_rows // readers} rows)"
    elif engine.micro_batch > 1:
        yield f"engine.micro_batch={engine.micro_batch // 2} (more micro-batches, the same numbers)"
    ways = (_activations(engine), _logits(engine))
    logits_first = plan is not None and _share(plan, ("logits",)) > _share(plan, ("activations",))
    yield from chain(*(reversed(ways) if logits_first else ways))
    if distributed.world_size() % (2 * engine.sequence_parallel) == 0:
        yield f"engine.sequence_parallel={2 * engine.sequence_parallel} (half as many tokens of a row on each rank)"
    yield f"data.seq_len (now {config.data.seq_len})"


def _logits(engine: EngineConfig) -> Iterator[str]:
    if engine.tiled_loss is None:
        yield "engine.tiled_loss=1024 (a tile's logits at a time, the same numbers)"


def _activations(engine: EngineConfig) -> Iterator[str]:
    if not engine.activation_checkpointing:
        yield "engine.activation_checkpointing=true (a third more time, the same numbers)"
    elif not engine.offload_activations and torch.cuda.is_available():
        yield "engine.offload_activations=true (what layers are recomputed from, in host memory)"
    if engine.tiled_mlp is None:
        yield "engine.tiled_mlp=4096 (MLPs a tile at a time, computed once more; the same numbers)"


def _state(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage < 3:
        yield "engine.zero_stage=3"
    if engine.offload is Offload.none:
        yield "engine.offload=optimizer"
    elif engine.offload is Offload.optimizer:
        yield "engine.offload=all (with engine.zero_stage=3)"
    yield f"or more ranks (now {distributed.world_size()}), among which the state is split"
