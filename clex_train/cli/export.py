"""Write a trained model for other programs.

    python -m clex_train.cli.export run=runs/mine format=huggingface t=4 output=exports/mine_t4
    python -m clex_train.cli.export run=runs/mine format=huggingface length=65536 output=exports/mine_64k
    python -m clex_train.cli.export model=path/to/final format=vllm 't=[4,16]' log_scale=off output=exports/mine
    python -m clex_train.cli.export run=runs/llama2_7b_clex format=official output=exports/llama2_7b_clex

`huggingface` is the model at one t, for plain transformers; `vllm` the same with overrides for several t and the
command line; `sglang` the same for the families that SGLang scales; `official` the layout of the original CLEX code
(DAMO-NLP-SG/CLEX). Needs no GPU. `--help` lists every key.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.cli import loading
from clex_train.config import saved_config
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.console import arguments, program
from clex_train.evaluation import results
from clex_train.export import huggingface, serving
from clex_train.export.factors import FixedRope, Source, rope_at
from clex_train.export.model_card import Measured
from clex_train.export.official import require_known, write_official
from clex_train.export.source import read_source
from clex_train.models import architecture, directory, load
from clex_train.report import evidence
from clex_train.utils import files, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, InputError, require, require_at_most

logger = log.get(__name__)


class Format(Enum):
    """Programs that a model can be written for."""

    huggingface = "huggingface"
    vllm = "vllm"
    sglang = "sglang"
    official = "official"


class Weights(Enum):
    """How weights that do not change get into the export."""

    link = "link"
    copy = "copy"


class Scaling(Enum):
    """Values of `log_scale`: those of every format."""

    folded = "folded"
    off = "off"
    eval = "eval"
    always = "always"
    official = "official"


@dataclass
class ExportConfig:
    """Arguments of the export program."""

    run: str | None = None
    """Folder of a finished run: its `final/` is exported."""
    model: str | None = None
    """Model directory instead of a run: the `final/` of a run, or one in the official layout."""
    format: Format = Format.official
    """`huggingface`: transformers, at one t. `vllm`, `sglang`: the same, for these servers. `official`: what the
    original CLEX code reads."""
    output: str | None = None
    """Directory to write; it must not exist yet."""
    t: str | None = None
    """Scale factor in [1, t_max]: the export serves t * L tokens. `vllm` takes several, as [4,16]: the directory states
    the largest, and one override a t goes beside it. A model of a formula has one t, and needs no key."""
    length: int | None = None
    """Context in tokens instead of `t`: the least t of the frequency table that the run uses for it."""
    log_scale: Scaling | None = None
    """`folded`: the constant of t * L tokens goes into the queries, the default if the run has a policy; `off`: leave
    it out. With format=official what its config says, `off` or `official`, by default the run's policy."""
    weights: Weights = Weights.link
    """`link`: link the weight files where they do not change (hard, else symbolic); `copy`: copy them."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""


def main() -> None:
    """Export the model of the command line; refuse unusable input before weights are read."""
    args = arguments.parse(ExportConfig, sys.argv[1:])
    source = _source(args)
    output = Path(args.output)
    # One writer a format; each checks, says what is ahead, and writes.
    writers: dict[Format, Callable[[ExportConfig, Path, Path], None]] = {
        Format.huggingface: _huggingface,
        Format.vllm: _vllm,
        Format.sglang: _sglang,
        Format.official: _official,
    }
    with arguments.named_as_typed(args):
        writers[args.format](args, source, output)


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, ExportConfig)


def _huggingface(args: ExportConfig, directory: Path, output: Path) -> None:
    source = _records(args, directory)
    (t,) = _scale_factors(args, source)
    planned = _plan(args, source, directory, t)
    _announce(args, directory, output)
    huggingface.write(planned, output, _measured(args))
    print(f"written to {output}: t = {t:g}, up to {planned.rope.served_len:,} tokens")
    print(serving.sglang_line(source.arch.model_type))


def _sglang(args: ExportConfig, directory: Path, output: Path) -> None:
    source = _records(args, directory)
    serving.require_sglang(source.arch.model_type)
    _huggingface(args, directory, output)


def _vllm(args: ExportConfig, directory: Path, output: Path) -> None:
    source = _records(args, directory)
    factors = _scale_factors(args, source, many=True)
    ropes: list[FixedRope] = [rope_at(source, t) for t in factors]
    serving.require_vllm(ropes[0], source.arch)
    require(
        len(factors) == 1 or not _folds(args, source),
        "t",
        args.t,
        f"one set of weights, and log_scale={source.log_scale.name} of the run is another constant in them for each t; "
        "use log_scale=off, or one t",
    )
    planned = _plan(args, source, directory, factors[-1])
    _announce(args, directory, output)
    huggingface.write(planned, output, _measured(args), ropes)
    print(f"written to {output}\n\n{serving.length_table(source, ropes)}\n")
    print("\n".join(serving.vllm_command(output, rope) for rope in ropes))
    print(f"\n{serving.sglang_line(source.arch.model_type)}")


def _official(args: ExportConfig, directory: Path, output: Path) -> None:
    for key in ("t", "length"):
        require(
            getattr(args, key) is None,
            key,
            getattr(args, key),
            "the official layout has the whole field; name format=huggingface or another for one t",
        )
    policy = _official_policy(args, directory)
    _announce(args, directory, output)
    loaded = load.load_for_evaluation(ModelConfig(path=str(directory)), dtype="auto")
    write_official(output, loaded, policy)
    print(f"written to {output}")


def _announce(args: ExportConfig, source: Path, output: Path) -> None:
    print(log.printable(f"export {source} as {args.format.value} to {output}"), file=sys.stderr, flush=True)


def _source(args: ExportConfig) -> Path:
    """Return the requested model directory; `ConfigError` names the key that is missing or wrong."""
    require((args.run is None) != (args.model is None), "run", args.run, "name either run=FOLDER or model=DIR")
    require(bool(args.output), "output", args.output or None, "name the directory to write, output=DIR")
    require_at_most(args, "", {"length": MOST_TOKENS})
    output = Path(str(args.output))
    files.require_writable_folder("output", output, output.parent, files.SAVING + output.name)
    require(not output.exists(), "output", args.output, "exists already; name another directory")
    if args.model is not None:
        _require_field(args, args.model, "model", args.model, "no directory with a CLEX field in it")
        _require_no_mask(args, Path(args.model).resolve().parent)
        return huggingface.require_directory("model", args.model)
    final = Path(str(args.run)) / saved_config.FINAL
    require(final.is_dir(), "run", args.run, "no final/ in it; give the output_dir of a finished training run")
    loading.require_whole(Path(str(args.run)))
    _require_field(args, str(final), "run", args.run, "was trained without CLEX: it has nothing to export")
    _require_no_mask(args, Path(str(args.run)))
    return final


def _require_field(args: ExportConfig, path: str, key: str, value: str | None, remedy: str) -> None:
    """Refuse a model without a field in the official layout; the others can state the RoPE of a formula."""
    require(args.format is not Format.official or architecture.has_field(path), key, value, remedy)


def _require_no_mask(args: ExportConfig, run: Path) -> None:
    """Refuse a run with LM-Infinite, whose mask is in no engine."""
    if not (run / saved_config.CONFIG).is_file() or not (run / saved_config.FINAL).is_dir():
        return
    require(
        not saved_config.read(run / saved_config.CONFIG).attention.lambda_mask,
        "run" if args.run else "model",
        args.run or args.model,
        "trained with LM-Infinite: no engine has its distance cap and its rolling window beside the first tokens; "
        "clex_train alone serves it (docs/lm_infinite.md)",
    )


def _records(args: ExportConfig, directory: Path) -> Source:
    return read_source(ModelConfig(path=str(directory), trust_remote_code=args.trust_remote_code))


def _scale_factors(args: ExportConfig, source: Source, many: bool = False) -> list[float]:
    """Return the scale factors that are requested, ascending; `ConfigError` for none, or several without `many`."""
    require(args.t is None or args.length is None, "length", args.length, f"give it or t={args.t}, not both")
    if args.length is not None:
        return [source.t_for(args.length)]
    if args.t is None:
        require(source.table is None and source.handle.own is None, "t", None, _wanted(source))
        return [source.t_max]
    factors = sorted({_number(text) for text in args.t.strip().removeprefix("[").removesuffix("]").split(",")})
    require(many or len(factors) == 1, "t", args.t, "one scale factor; format=vllm takes several")
    return factors


def _wanted(source: Source) -> str:
    return (
        f"name the scale factor, from 1 to {source.t_max:g}, t=4 for 4 * {source.context_len:,} tokens; or the context "
        "by length=N"
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(math.isfinite(value), "t", text.strip() or "''", "a number from 1 to t_max, or several as [4,16]")
    return value


def _folds(args: ExportConfig, source: Source) -> bool:
    """Return True if log-scaling is folded; `ConfigError` for a policy, which only the official layout has."""
    allowed = (None, Scaling.folded, Scaling.off)
    require(
        args.log_scale in allowed,
        "log_scale",
        args.log_scale.name if args.log_scale else None,
        "an engine cannot follow the length; `folded` puts the constant of t * L tokens into the weights, `off` leaves "
        "it out",
    )
    if args.log_scale is Scaling.off and source.log_scale is not LogScale.off:
        logger.warning("log_scale=off: the run has log_scale=%s, which this export lacks", source.log_scale.name)
    return args.log_scale is not Scaling.off and source.log_scale is not LogScale.off


def _plan(args: ExportConfig, source: Source, directory: Path, t: float) -> huggingface.Plan:
    link = args.weights is Weights.link
    return huggingface.plan(source, directory, t, _folds(args, source), link, args.trust_remote_code)


def _official_policy(args: ExportConfig, source: Path) -> LogScale | None:
    """Return the policy of the official layout; refuse one that it does not know, requested or of the run."""
    if args.log_scale is not None:
        require(args.log_scale is not Scaling.folded, "log_scale", "folded", "the official layout knows policies only")
        policy = LogScale(args.log_scale.value)
        require_known(policy)
        return policy
    if directory.has_clex(source):
        require_known(LogScale(directory.read_record(source).log_scale))
    return None


def _measured(args: ExportConfig) -> list[Measured]:
    """Return the perplexities of the run by length, of its newest evaluation and the others of the same weights."""
    if args.run is None:
        return []
    try:
        paths = evidence.find_evaluations(Path(args.run))
    except ConfigError:
        # A run may have none; the card says so.
        return []
    found: dict[tuple[str, int], Measured] = {}
    for path in paths:
        try:
            scores = results.read(path)[0].scores
        except InputError as error:
            logger.warning("left out of the model card: %s", error)
            continue
        own = [each for each in scores if each.method == "trained" and each.protocol != "per_position"]
        found |= {(s.protocol, s.length): Measured(s.length, s.t, s.protocol, s.perplexity) for s in own}
    return list(found.values())


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
