"""Model that a program evaluates: which one, whether its keys fit together, where its results go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clex_train.config.engine import EngineConfig
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config
from clex_train.console import program as console
from clex_train.console.loading_keys import LoadingConfig, check_model
from clex_train.engine import deepspeed
from clex_train.evaluation import partial_results
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.results import Origin, place
from clex_train.model_config import size
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import architecture, weights
from clex_train.tracking import saved_config, summary
from clex_train.utils import checksums, distributed, log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import require_plain_name, require_writable_folder, temporary_path

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*.py")

logger = log.get(__name__)


@dataclass(frozen=True)
class Source:
    """Model to evaluate, before weights are read."""

    model: ModelConfig
    context_len: int
    context_source: str
    """Source of L, for messages."""
    label: str
    output: Path


def check(args: LoadingConfig) -> None:
    """Raise `ConfigError` for keys that contradict each other or this machine."""
    check_model(args)
    if args.label is not None:
        require_plain_name("label", args.label, "it names the file of results")
    require(args.output != "", "output", "''", "name a JSON file, or leave the key out")
    require(
        args.sharded or not args.offload_parameters,
        "offload_parameters",
        args.offload_parameters,
        "only sharded weights can be kept on the host; set sharded=true too",
    )


def locate(args: LoadingConfig) -> Source:
    """Find the model, its L, and the file of results; `ConfigError` if one of them cannot be used."""
    model = args.named_model()
    arch = architecture.to_read(model)
    weights.check(model, arch)
    label = args.label or _name(Path(args.run or args.path).resolve())
    folder = Path(args.run) if args.run else Path("runs") / label
    output = Path(args.output) if args.output else folder / "evaluation" / f"{label}.json"
    if not args.run and not args.output:
        _require_no_other_run(folder, Path(args.path), label)
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
    """Raise `ConfigError` for a results folder that is another model's run: its report would include the results."""
    is_other = (folder / "config.yaml").is_file() and folder.resolve() not in model.resolve().parents
    require(
        not is_other, "label", label, f"{folder} is a training run, and model={model} is not of it; name another label"
    )


def _name(folder: Path) -> str:
    """Return the name of a run or model; for a `final/`, a name that all runs share, that of its run."""
    is_final = folder.name == "final" and (folder.parent / "config.yaml").is_file()
    return folder.parent.name if is_final else folder.name


def require_writable(output: Path) -> None:
    """Raise `ConfigError` for a file that cannot be written, before hours of computing its content. Creates nothing."""
    require_writable_folder("output", output, output.parent, temporary_path(output).name)
    require(not output.is_dir(), "output", output, "it is a folder; name a JSON file")
    regular = output.is_file() or not output.exists()
    require(regular, "output", output, "it is a device or a pipe, which a file would replace; name a JSON file")


def print_plan(program: str, args: LoadingConfig, source: Source, lines: Iterable[str]) -> None:
    """Print the plan of an evaluation before weights are read; `lines` are the program's own."""
    if not distributed.is_main():
        # Rank 0 flushes after it has printed the block.
        log.flush()
        return
    arch = architecture.to_read(source.model)
    precision = deepspeed.precision(EngineConfig(precision=args.precision))
    subject = summary.Subject(
        weights=f"weights of {args.path}",
        model_type=arch.model_type,
        num_parameters=size.num_parameters(model_on_meta(arch, source.model.trust_remote_code)),
        dtype=precision,
        context_len=source.context_len,
        context_source=source.context_source,
    )
    t_max = architecture.t_max_of_field(args.path)
    own = "none: its own frequencies" if t_max is None else _reach(t_max, source.context_len)
    ranks = distributed.world_size()
    split = ", the weights split over them" if args.sharded else ""
    summary.print_summary(
        f"{program} {source.label} on {summary.device()} ({summary.versions()})",
        (
            *summary.model(subject),
            summary.labelled("scaling", own),
            *lines,
            summary.labelled("ranks", f"{ranks}{split}"),
            summary.labelled("output", "none: a dry run times one chunk" if args.dry_run else str(source.output)),
        ),
    )


def _reach(t_max: float, context_len: int) -> str:
    return f"clex: t from 1 to {t_max:g}, contexts up to {int(t_max * context_len):,} tokens"


def write_results(
    args: LoadingConfig, preferred: Path, origin: Origin, text: str, write: Callable[[Path], None]
) -> None:
    """Call `write` with the file of an evaluation, and print `text`, its tables.

    A file at `preferred` is replaced if this evaluation repeats it or `output` names it; otherwise it is kept, and the
    new file gets another name in the same folder. `RunStopped` if it cannot be written.
    """
    output = preferred if args.output else place(preferred, origin)
    if output != preferred:
        logger.info("%s is another evaluation and is kept; writing this one to %s", preferred, output)
    with printing_on_failure(output, text):
        write(output)
    console.echo(f"{text}\n\nwritten to {output}")


def resume_partial(
    args: LoadingConfig, model: ModelConfig, output: Path, origin: Origin, more: Mapping[str, Any]
) -> Partial:
    """Load the partial results for `output` of an evaluation with the same origin and the same `more`. Collective.

    Weights are identified by their hash, a hub model's by name and revision; the tokenizer and Python code that come
    with them by their files.
    """
    facts = {
        **origin.request,
        **origin.environment,
        "data": origin.data.get("fingerprint", ""),
        **identity(args, model, origin),
        **more,
    }
    return partial_results.resume(output, facts)


def identity(args: LoadingConfig, model: ModelConfig, origin: Origin) -> dict[str, Any]:
    """Identify the model that an evaluation reads, and how: weights, tokenizer, attention, sharding."""
    directory = Path(str(model.path))
    return {
        "weights": origin.model.get("hash") or [str(directory), model.revision],
        "tokenizer": origins.files_hash(directory, TOKENIZER_FILES) if directory.is_dir() else "",
        "attention": args.attention.value,
        "sharded": args.sharded,
        "offload_parameters": args.offload_parameters,
    }


@contextmanager
def printing_on_failure(output: Path, text: str) -> Iterator[None]:
    """Print `text`, the tables, if the block cannot write the file, as on a full disk; then raise `RunStopped`."""
    try:
        yield
    except OSError as error:
        console.echo(text)
        remedy = (
            "the results are printed above, keep them; for the file make room or name another place and evaluate again"
        )
        raise console.write_failure(output, error, remedy) from error


def run_config(run: Path) -> Config:
    """Read the configuration of a finished run; `ConfigError` names the missing file."""
    require(run.is_dir(), "run", run, "no such folder; give the output_dir of a training run")
    require(
        (run / saved_config.CONFIG).exists(),
        "run",
        run,
        "not a run folder (no config.yaml); use model=DIR for a model",
    )
    finished = (run / "final").is_dir()
    require(finished, "run", run, "not finished (no final/); start the same training command again, it continues")
    require_whole(run)
    return saved_config.read(run / saved_config.CONFIG)


def require_whole(run: Path) -> None:
    """Raise `ConfigError` if a file of a run's `final/` is missing or has another size than it was written with."""
    try:
        if checksums.exists(run / "final"):
            checksums.require_sizes(run / "final")
    except checksums.Damaged as damaged:
        raise ConfigError(
            "run", run, f"its final/ is damaged: {damaged}; start the same training command again, which rewrites it"
        ) from damaged
