"""Prepare data: `python -m data_prep VERB [+corpus=NAME] [key=value ...]`.

    corpus            write a corpus as one file of {"text", "meta"} lines
    train_tokenizer   train a byte-level BPE tokenizer on a corpus
    tokenize          turn a corpus into a token store, which training and evaluation read
    chat              turn conversations into a token store with a mask of the tokens that the loss counts
    show              print conversations of a store, with the tokens that the loss counts marked
    inspect           show the content of a token store, verify its checksums
    evaluation_sets   write a store of long held-out documents for each length
    retrieval_text    write synthetic documents that state a fact, and state it again after filler from a corpus
    benchmark         write LongBench, LongBench v2, RULER or BABILong for lm-eval, from their published files
    decontaminate     find evaluation documents that appear, whole or in part, in the training documents

    python -m data_prep train_tokenizer +corpus=stdlib
    python -m data_prep tokenize +corpus=stdlib
    python -m data_prep tokenize +corpus=redpajama_book 'corpus.paths=[/data/book]' tokenizer=/models/llama
    python -m data_prep chat 'corpus.paths=[chats.jsonl]' tokenizer=/models/llama-chat output=corpora/chats

`python -m data_prep VERB --help` lists the keys of a verb; conf/corpus/ holds the corpora that `+corpus=` accepts.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C during them ends the program without a traceback.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from clex_train.config.docs import describe
from clex_train.console import program
from clex_train.console.help import options
from clex_train.utils import log
from clex_train.utils.locations import CONF
from data_prep.benchmark.config import BenchmarkVerb
from data_prep.chat.config import ChatVerb, ShowVerb
from data_prep.config import (
    CorpusVerb,
    DecontaminateVerb,
    EvaluationSetsVerb,
    InspectVerb,
    TokenizeVerb,
    TrainTokenizerVerb,
)
from data_prep.retrieval_text.config import RetrievalTextVerb

VERBS: dict[str, tuple[type, str]] = {
    "corpus": (CorpusVerb, "data_prep.export"),
    "train_tokenizer": (TrainTokenizerVerb, "data_prep.train_tokenizer"),
    "tokenize": (TokenizeVerb, "data_prep.tokenize.run"),
    "chat": (ChatVerb, "data_prep.chat.run"),
    "show": (ShowVerb, "data_prep.chat.show"),
    "inspect": (InspectVerb, "data_prep.inspect"),
    "evaluation_sets": (EvaluationSetsVerb, "data_prep.evaluation_sets"),
    "retrieval_text": (RetrievalTextVerb, "data_prep.retrieval_text.run"),
    "benchmark": (BenchmarkVerb, "data_prep.benchmark.run"),
    "decontaminate": (DecontaminateVerb, "data_prep.decontaminate.run"),
}
"""Schema of each verb and the module whose `run` implements it, imported on use."""

STARTS_OVER = "nothing is kept, the same command starts over"
KEPT = {
    "tokenize": "finished shards are kept, run the same command to continue",
    "chat": "finished shards are kept, run the same command to continue",
    "show": "nothing was changed",
    "inspect": "nothing was changed",
}
"""Message about the work that remains when a signal ends a verb."""


def main() -> int:
    """Run the verb named by the first argument and return the exit code."""
    log.setup()
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h"):
        print(__doc__)
        return 0
    if verb not in VERBS:
        print(f"error: {log.printable(verb)}: no such verb; use one of {', '.join(VERBS)}", file=sys.stderr)
        return program.USER_ERROR
    schema, module = VERBS[verb]
    # Hydra allows one config per process, so the schema is chosen before it reads the command line.
    ConfigStore.instance().store(name="data_prep_schema", node=schema)
    # Remove the verb: Hydra would take it for an override.
    sys.argv[1:] = [_expand_group_path(argument) for argument in sys.argv[2:]]
    return program.run(partial(_run, module), partial(_help, verb, schema), schema, KEPT.get(verb, STARTS_OVER))


def _expand_group_path(argument: str) -> str:
    """Rewrite `tokenizer=PATH` to `tokenizer.path=PATH`, since Hydra refuses a value for a group."""
    key, _, path = argument.partition("=")
    return f"{key}.path={path}" if path and key.lstrip("+") in ("tokenizer", "evaluation") else argument


def _run(module: str) -> None:
    """Compose the config and run the verb."""

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="data_prep")
    @program.task
    def verb(composed: DictConfig) -> None:
        # DictConfig ends here; verbs get plain dataclasses.
        config: Any = OmegaConf.to_object(composed)
        importlib.import_module(module).run(config)

    verb()


def _help(verb: str, schema: type) -> str:
    """List the keys of a verb with type, default and description, and the corpora."""
    lines = [f"python -m data_prep {verb} [+corpus=NAME] [key=value ...]", "", "Corpora", ""]
    lines += [f"  {name:<16} {comment}" for name, comment in options("corpus")]
    lines += ["", "Keys: name=default (type) and meaning", ""]
    for key, kind, default, meaning in describe(schema):
        lines.append(f"  {key}={default}  ({kind})\n      {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
