"""List the key tokens of held-out windows for LongPPL, once, with one evaluator.

    python -m data_prep.key_tokens model=DIR_OR_HUB_NAME data=corpora/books lengths=[32768] output=key_tokens.json
    python -m clex_train.cli.evaluate run=runs/tiny_clex protocols=[one_shot,long_ppl] key_tokens=key_tokens.json

The evaluator reads every window at its full length, and again with a short context. A token is key if the long context
raises its log-probability by more than `alpha` nats, to more than `beta`. The file names evaluator, store, windows and
settings; evaluations of other windows or another store refuse it. The evaluator needs the store's tokenizer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.cli.evaluation_plan import KEYS, EvaluateArguments, make_plan
from clex_train.cli.load_model import load
from clex_train.cli.loading import print_plan, printing_on_failure
from clex_train.config.evaluation import EvaluationConfig
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.console.loading_keys import with_overrides
from clex_train.evaluation import key_tokens, methods, runner
from clex_train.evaluation import provenance as origin
from clex_train.evaluation.windows import WindowSet, select
from clex_train.measures.key_tokens import find
from clex_train.tracking.summary import labelled
from clex_train.utils import distributed, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most


@dataclass
class KeyTokensArguments(EvaluateArguments):
    """Arguments of this program, without those of the `evaluation` group."""

    alpha: float = 2.0
    """Nats by which the long context must raise the log-probability of a key token, above 0."""
    beta: float = -2.0
    """Log-probability in nats that a key token has at least with the long context, below 0."""
    short_context: int | None = None
    """K, tokens of the short context; null: an eighth of the window, as 4,096 of 32k in the paper."""
    short_stride: int | None = None
    """Tokens that share a short context; null: a quarter of K, as 1,024 in the paper."""


KeyTokensConfig = with_overrides(KeyTokensArguments, EvaluationConfig, KEYS, otherwise="By default the run's.")


@log.buffered()
def main() -> None:
    """List the key tokens of the command line's model and windows; refuse unusable input before weights are read."""
    args: KeyTokensArguments = arguments_of.parse(KeyTokensConfig, sys.argv[1:])
    with arguments_of.named_as_typed(args):
        _run(args)


def _run(args: KeyTokensArguments) -> None:
    require(args.output is not None, "output", args.output, "name the file to write: output=key_tokens.json")
    require(not args.dry_run, "dry_run", args.dry_run, "this program has none; use that of clex_train.cli.evaluate")
    require(args.alpha > 0, "alpha", args.alpha, "more than 0 nats")
    require(args.beta < 0, "beta", args.beta, "a log-probability below 0")
    require_at_most(args, "", {"short_context": MOST_TOKENS, "short_stride": MOST_TOKENS})
    plan = make_plan(args)
    names = [method.value for method in plan.spec.methods]
    require(len(names) == 1, "methods", names, "one evaluator reads the windows by one method; name one")
    longest = max(plan.spec.lengths)
    short = longest // 8 if args.short_context is None else args.short_context
    stride = max(1, short // 4) if args.short_stride is None else args.short_stride
    fits = short >= 1 and stride >= 1 and short + stride < longest
    require(fits, "short_context", short, f"with short_stride={stride}, less than the window of {longest} tokens")
    windows = select(plan.store, longest, plan.spec.num_windows, args.seed, plan.bos_id)
    what = f"{len(windows.tokens)} windows of {longest:,} tokens, short context {short:,} to {short + stride - 1:,}"
    print_plan("key-tokens", args, plan, [labelled("data", f"{plan.store.path}: {what}")])
    loaded, dtype = load(args, plan.model)
    size = plan.spec.chunk_len
    feeding = runner.Feeding(size, args.batch_tokens or size, distributed.device(), None, plan.spec.offload_cache)
    tables = methods.model_tables(plan.spec, loaded)
    mask = find(loaded.model, loaded.handle, tables, windows, feeding, short, stride, args.alpha, args.beta)
    path = Path(str(plan.model.path))
    evaluator = {"path": str(path), "hash": origin.weights_hash(path), "revision": plan.model.revision}
    keys = key_tokens.KeyTokens(
        evaluator=evaluator | {"method": names[0], "dtype": str(dtype).removeprefix("torch.")},
        store={"path": str(plan.store.path), "fingerprint": plan.store.fingerprint},
        windows=_windows(windows),
        short_context=short,
        stride=stride,
        alpha=args.alpha,
        beta=args.beta,
        positions=[row.nonzero()[0].tolist() for row in mask],
    )
    if distributed.is_main():
        text = f"{int(mask.sum()):,} of {mask.size:,} tokens are key tokens"
        with printing_on_failure(plan.output, text):
            key_tokens.write(plan.output, keys)
        program.echo(f"{text}\n\nwritten to {plan.output}")


def _windows(windows: WindowSet) -> dict[str, object]:
    described = runner.describe(windows)
    return {key: described[key] for key in ("count", "length", "fingerprint")}


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments_of.usage(__doc__, KeyTokensConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
