"""Print the plan of a run on any machine: sizes, tokens, memory. No weights, no data, no GPU, no DeepSpeed."""

from collections.abc import Iterator

from clex_train.config.root import Config
from clex_train.data.build import describe, mixture_line, packing_line, planned_epochs
from clex_train.preflight.memory_plan import Plan, gib, make_plan, memory_table
from clex_train.preflight.run_checks import Inputs, Scope, run_checks
from clex_train.tracking import summary
from clex_train.utils import distributed, log


@log.buffered()
def print_plan(config: Config) -> None:
    """Print the plan on rank 0; raise `ConfigError` wherever a run of the same configuration would."""
    if not distributed.is_main():
        return
    plan = make_plan(run_checks(config, Scope.plan))
    print(log.printable("\n".join((*_summary(plan), "", *memory_table(plan)))), flush=True)


def _summary(plan: Plan) -> Iterator[str]:
    config = plan.config
    yield f"plan of {config.name}"
    yield from summary.training(config, plan.subject, plan.batch, _data(config, plan.inputs))
    for index, line in enumerate(plan.adapters.describe() if plan.adapters else ()):
        yield summary.labelled("" if index else "adapter", line)
    trainable = "all" if plan.counts.trainable == plan.counts.total else f"{plan.counts.trainable:,}"
    yield summary.labelled("trained", f"{trainable} parameters, and {plan.num_learned:,} of the frequencies in float32")
    if not config.model.is_pretrained and plan.inputs.tokenizer is None:
        yield summary.labelled("", "the vocabulary is that of model.config here; the run takes the data store's")
    if plan.evaluation_cache:
        longest, size = config.evaluation.longest(), gib(plan.evaluation_cache)
        where = "in host memory" if config.evaluation.offload_cache else "in addition to the training state"
        yield summary.labelled("", f"evaluating {longest:,} tokens: keys and values take {size} GiB a rank, {where}")
    yield summary.labelled("output", config.output_dir)


def _data(config: Config, inputs: Inputs) -> Iterator[str]:
    """Describe the data like the run itself, or by its configuration if a store is on another machine."""
    data = config.data
    if inputs.is_complete:
        documents = inputs.held_out if config.evaluation.every >= 0 else None
        lines = describe(inputs.stores, inputs.packed, data, config.optim, documents)
        yield from (summary.labelled(label, text) for label, text in lines)
        return
    named = ", ".join(data.domains) or data.path
    missing = "not all of it on this machine" if data.domains else "not on this machine"
    yield summary.labelled("data", f"{named} ({missing}: not checked)" if named else "no store is named")
    yield summary.labelled("packing", packing_line(data))
    if data.domains:
        yield summary.labelled("mixture", mixture_line(data))
        yield summary.labelled("repeated", planned_epochs(data, config.optim))
