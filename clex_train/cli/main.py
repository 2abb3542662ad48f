"""The command `clex-train VERB [key=value ...]`: every program of the package under one name.

    clex-train prepare tokenize +corpus=stdlib
    clex-train dry-run +experiment=tiny_clex
    clex-train train +experiment=tiny_clex
    clex-train evaluate run=runs/tiny_clex methods=[trained,ntk]
    clex-train report runs/tiny_clex

A verb takes the arguments of its program and ends with its exit code; `clex-train VERB --help` lists its keys.
`train` is one process. Several GPUs: `deepspeed --module clex_train.train +experiment=NAME`, with the same keys.
"""

import runpy
import sys
from dataclasses import dataclass

from clex_train.utils import log, versions
from clex_train.utils.suggestions import did_you_mean

USER_ERROR = 2


@dataclass(frozen=True)
class Verb:
    """A program and its line in the list of verbs."""

    module: str
    """Run as `python -m` would, so that it answers signals before its slow imports."""
    meaning: str
    extra: tuple[str, ...] = ()
    """Arguments behind the user's own."""


VERBS = {
    "train": Verb("clex_train.train", "train or fine-tune a model"),
    "evaluate": Verb("clex_train.cli.evaluate", "perplexity and retrieval against context length"),
    "generate": Verb("clex_train.cli.generate", "text from a prompt, streamed; plain or chat"),
    "key-tokens": Verb("data_prep.key_tokens", "list the tokens of held-out text that LongPPL scores"),
    "average": Verb("clex_train.cli.average", "the mean of the last checkpoints of a run as a model"),
    "export": Verb("clex_train.cli.export", "write a trained model in another program's layout"),
    "rope": Verb("clex_train.cli.rope", "RoPE frequencies that a saved model loads, and what engines make of them"),
    "report": Verb("clex_train.cli.report", "one page of tables and figures from evaluations"),
    "lm-eval": Verb("clex_train.cli.lm_eval", "LongBench, RULER and other tasks of lm-eval (needs clex-train[eval])"),
    "prepare": Verb("data_prep", "tokenizers, token stores, evaluation sets, decontamination"),
    "slurm": Verb("launch.slurm", "submit a training run to SLURM"),
    "dry-run": Verb("clex_train.train", "print sizes, memory and tokens of a run; loads nothing", ("dry_run=true",)),
    "info": Verb("clex_train.cli.info", "versions, devices, optional kernels and what is missing"),
}


def main() -> int:
    """Run the program of the verb that the first argument names; return the exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(usage())
        return 0
    if name == "--version":
        print(f"{versions.OWN} {versions.own()}")
        return 0
    if name not in VERBS:
        remedy = did_you_mean(name, [*VERBS]) or f"take one of {', '.join(VERBS)}"
        print(f"error: {log.printable(name)}: no such verb; {remedy}", file=sys.stderr)
        return USER_ERROR
    verb = VERBS[name]
    sys.argv[1:] = [*arguments, *verb.extra]
    # Programs end by SystemExit, with the exit codes of `console.program`.
    runpy.run_module(verb.module, run_name="__main__", alter_sys=True)
    return 0


def usage() -> str:
    """Return the text of `--help`."""
    verbs = [f"    {name:<10} {verb.meaning}" for name, verb in VERBS.items()]
    return "\n".join([str(__doc__).rstrip(), "", *verbs])


if __name__ == "__main__":
    sys.exit(main())
