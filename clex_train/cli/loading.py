"""Which model a program evaluates and how it is held in memory: the keys that these programs share, and the loading.

`sharded=true` splits the weights over the ranks (ZeRO-3) while they are read; each layer's are gathered as it runs, so
that every rank has to run the same number of forwards. `offload_parameters=true` keeps the shares in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from clex_train.cli.keys import LoadingConfig
from clex_train.config import recorded
from clex_train.config.engine import EngineConfig, Offload
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.engine import deepspeed
from clex_train.evaluation import partial_results
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.results import Origin, place
from clex_train.models import architecture, size, weights
from clex_train.models import load as modeling
from clex_train.models.load import LoadedModel
from clex_train.rope.probe import model_on_meta
from clex_train.tracking import summary
from clex_train.utils import checksums, distributed, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, require, require_at_most
from clex_train.utils.files import require_plain_name, require_writable_folder, temporary_path

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.py")

logger = log.get(__name__)


@dataclass
class EvaluatedModel(ModelConfig):
    """A model whose keys stand by themselves on the command line, not in a group."""

    PREFIX: ClassVar[str] = ""


@dataclass(frozen=True)
class Source:
    """What is evaluated, before weights are read."""

    model: ModelConfig
    context_len: int
    context_source: str
    """What says that L is so long."""
    label: str
    output: Path


def check(asked: LoadingConfig) -> None:
    """Refuse by `ConfigError` keys that contradict each other or this machine."""
    require((asked.run is None) != (asked.model is None), "run", asked.run, "name either run=FOLDER or model=DIR")
    if asked.label is not None:
        require_plain_name("label", asked.label, "it names the file of results")
    require(asked.output != "", "output", "''", "name a JSON file, or leave the key out")
    _check_revision(asked)
    require_at_most(asked, "", {"context_len": MOST_TOKENS})
    require(asked.context_len is None or asked.context_len >= 2, "context_len", asked.context_len, "at least 2 tokens")
    require(
        asked.sharded or not asked.offload_parameters,
        "offload_parameters",
        asked.offload_parameters,
        "it is the shares of sharded weights that go to the host; set sharded=true too",
    )
    modeling.check_attention(asked.attention, "attention")


def _check_revision(asked: LoadingConfig) -> None:
    """Refuse a revision that nobody would read, and the results would name."""
    local = asked.run or (asked.model if asked.model and Path(asked.model).is_dir() else None)
    remedy = f"is of a hub repository, and {local} is a folder on this machine; leave the key out"
    require(asked.revision is None or local is None, "revision", asked.revision, remedy)


def locate(asked: LoadingConfig) -> Source:
    """Find the model that is meant, its L, and where the results go; `ConfigError` if one of them cannot be used."""
    model = EvaluatedModel(
        path=asked.path,
        context_len=asked.context_len,
        allow_missing=asked.allow_missing,
        trust_remote_code=asked.trust_remote_code,
        revision=asked.revision,
    )
    arch = architecture.to_read(model)
    weights.check(model, arch)
    label = asked.label or _name(Path(asked.run or asked.path).resolve())
    folder = Path(asked.run) if asked.run else Path("runs") / label
    output = Path(asked.output) if asked.output else folder / "evaluation" / f"{label}.json"
    if not asked.run and not asked.output:
        _require_no_other_run(folder, Path(asked.path), label)
    if distributed.is_main():
        require_writable(output)
    context = architecture.context_source(model, arch)
    return Source(
        model=model,
        context_len=context.length,
        context_source=context.source,
        label=label,
        output=output,
    )


def _require_no_other_run(folder: Path, model: Path, label: str) -> None:
    """Refuse a folder of results that is a training run of another model, whose report would take them for its own."""
    is_other = (folder / "config.yaml").is_file() and folder.resolve() not in model.resolve().parents
    require(
        not is_other, "label", label, f"{folder} is a training run, and model={model} is not of it; name another label"
    )


def _name(folder: Path) -> str:
    """The name of a run or model; that of the run for its `final/`, which all runs have."""
    is_final = folder.name == "final" and (folder.parent / "config.yaml").is_file()
    return folder.parent.name if is_final else folder.name


def require_writable(output: Path) -> None:
    """Refuse by `ConfigError` a file that cannot be written, before hours are spent on what would go into it.

    Makes nothing.
    """
    require_writable_folder("output", output, output.parent, temporary_path(output).name)
    require(not output.is_dir(), "output", output, "it is a folder; name a JSON file")
    regular = output.is_file() or not output.exists()
    require(regular, "output", output, "it is a device or a pipe, which a file would replace; name a JSON file")


def say_what_is_ahead(program: str, asked: LoadingConfig, source: Source, lines: Iterable[str]) -> None:
    """Print what is about to be run, before weights are read; `lines` are the program's own."""
    if not distributed.is_main():
        # What rank 0 does once its block is printed.
        log.flush()
        return
    arch = architecture.to_read(source.model)
    precision = deepspeed.precision(EngineConfig(precision=asked.precision))
    subject = summary.Subject(
        weights=f"weights of {asked.path}",
        model_type=arch.model_type,
        num_parameters=size.num_parameters(model_on_meta(arch, source.model.trust_remote_code)),
        dtype=precision,
        context_len=source.context_len,
        context_source=source.context_source,
    )
    t_max = architecture.t_max_of_field(asked.path)
    own = "none: its own frequencies" if t_max is None else _reach(t_max, source.context_len)
    ranks = distributed.world_size()
    split = ", the weights split over them" if asked.sharded else ""
    summary.say(
        f"{program} {source.label} on {summary.device()} ({summary.versions()})",
        (
            *summary.model(subject),
            summary.labelled("scaling", own),
            *lines,
            summary.labelled("ranks", f"{ranks}{split}"),
            summary.labelled("output", "none: a dry run times one chunk" if asked.dry_run else str(source.output)),
        ),
    )


def _reach(t_max: float, context_len: int) -> str:
    return f"clex: t from 1 to {t_max:g}, contexts up to {int(t_max * context_len):,} tokens"


def keep(asked: LoadingConfig, wished: Path, origin: Origin, text: str, write: Callable[[Path], None]) -> None:
    """Have `write` make the file of an evaluation and print `text`, its tables.

    A file at `wished` is replaced if this evaluation repeats it or `output` names it; otherwise it stays, and the new
    one goes beside it. `RunStopped` if it cannot be written.
    """
    output = wished if asked.output else place(wished, origin)
    if output != wished:
        logger.info("%s holds another evaluation and stays; this one goes beside it: %s", wished, output)
    with printed_at_least(output, text):
        write(output)
    console.say(f"{text}\n\nwritten to {output}")


def partial_of(
    asked: LoadingConfig, model: ModelConfig, output: Path, origin: Origin, more: Mapping[str, Any]
) -> Partial:
    """Return what an interrupted evaluation for `output` left that had the same origin and the same `more`. Collective.

    The weights are known by their hash, a hub model's by name and revision; the tokenizer and Python code that come
    with them by their files.
    """
    directory = Path(str(model.path))
    facts = {
        **origin.request,
        **origin.environment,
        "weights": origin.model.get("hash") or [str(directory), model.revision],
        "tokenizer": origins.files_hash(directory, TOKENIZER_FILES) if directory.is_dir() else "",
        "data": origin.data.get("fingerprint", ""),
        "attention": asked.attention.value,
        "sharded": asked.sharded,
        "offload_parameters": asked.offload_parameters,
        **more,
    }
    return partial_results.resume(output, facts)


@contextmanager
def printed_at_least(output: Path, text: str) -> Iterator[None]:
    """Around the writing of results: what keeps the file from being written, as a full disk does, does not lose them.

    Then `text`, the tables, is printed before the `RunStopped` that says so.
    """
    try:
        yield
    except OSError as error:
        console.say(text)
        remedy = (
            "the results are printed above, keep them; for the file make room or name another place and evaluate again"
        )
        raise console.unwritten(output, error, remedy) from error


def load(asked: LoadingConfig, model: ModelConfig) -> tuple[LoadedModel, torch.dtype]:
    """The model on this rank's device, whole or this rank's share of it, and its dtype. Collective."""
    engine = EngineConfig(precision=asked.precision, offload=Offload.all if asked.offload_parameters else Offload.none)
    if asked.sharded or distributed.world_size() > 1:
        deepspeed.open_process_group(engine)
    dtype = deepspeed.precision(engine)
    if asked.sharded:
        loaded = modeling.load_for_evaluation(model, dtype, asked.attention, deepspeed.inference_dict(engine))
        loaded.engine = deepspeed.build_for_inference(loaded.model, engine)
        return loaded, dtype
    loaded = modeling.load_for_evaluation(model, dtype, asked.attention)
    loaded.model.to(distributed.device())
    return loaded, dtype


def run_config(run: Path) -> Config:
    """Read the configuration of a finished run; `ConfigError` says what is missing."""
    require(run.is_dir(), "run", run, "no such folder; give the output_dir of a training run")
    require(
        (run / recorded.CONFIG).exists(),
        "run",
        run,
        "not a run folder (no config.yaml); use model=DIR for a model",
    )
    finished = (run / "final").is_dir()
    require(finished, "run", run, "not finished (no final/); start the same training command again, it continues")
    require_whole(run)
    return recorded.read(run / recorded.CONFIG)


def require_whole(run: Path) -> None:
    """Raise `ConfigError` if a file of a run's `final/` is missing or has another size than it was written with."""
    try:
        if checksums.exists(run / "final"):
            checksums.require_sizes(run / "final")
    except checksums.Damaged as damaged:
        raise ConfigError(
            "run", run, f"its final/ is damaged: {damaged}; start the same training command again, it is written anew"
        ) from damaged
