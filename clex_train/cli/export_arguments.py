"""Arguments of the export program: what they mean for one model, and what cannot be exported."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from clex_train.cli import loading
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.evaluation import results
from clex_train.export.factors import Source
from clex_train.export.model_card import Measured
from clex_train.export.source import MASKED, read_source
from clex_train.gguf.tensors import WeightType
from clex_train.models import architecture
from clex_train.report import evidence
from clex_train.tracking import saved_config
from clex_train.utils import files, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, InputError, require, require_at_most

logger = log.get(__name__)


class Format(Enum):
    """Programs that a model can be written for."""

    huggingface = "huggingface"
    vllm = "vllm"
    sglang = "sglang"
    gguf = "gguf"
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
    format: Format = Format.huggingface
    """`huggingface`: transformers, at one t. `vllm`, `sglang`: the same, for these servers. `gguf`: llama.cpp.
    `official`: what the original CLEX code reads."""
    output: str | None = None
    """Directory to write; it must not exist yet."""
    t: str | None = None
    """Scale factor in [1, t_max]: the export serves t * L tokens. `vllm` takes several, as [4,16]: the directory states
    the largest, and one override a t goes beside it. A model of a fixed formula has one t, and needs no key."""
    length: int | None = None
    """Context in tokens instead of `t`: the least t of the frequency table that the run uses for it."""
    log_scale: Scaling | None = None
    """`folded`: the constant of one length goes into the queries, the default if the run has a policy. The length is
    `length`, or the longest for which the run uses this t. `off`: leave it out. With format=official what its config
    says, `off` or `official`, by default the run's policy."""
    weights: Weights | None = None
    """`link`, the default: link the weight files where they do not change (hard, else symbolic); `copy`: copy them."""
    base_gguf: str | None = None
    """GGUF file of the trained weights with plain RoPE, such as a quantised one. format=gguf copies its tensors and
    adds the factors."""
    weight_type: WeightType | None = None
    """Matrices of format=gguf: `f32`, `f16`, `bf16`; by default the type that they are stored in."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""


DIRECTORIES = (Format.huggingface, Format.vllm, Format.sglang)
_WHOLE_FIELD = "the official layout has the whole field; name format=huggingface or another for one t"
APPLIES: dict[str, tuple[tuple[Format, ...], str]] = {
    "t": ((*DIRECTORIES, Format.gguf), _WHOLE_FIELD),
    "length": ((*DIRECTORIES, Format.gguf), _WHOLE_FIELD),
    "weights": (DIRECTORIES, "this format writes the weights anew; leave the key out"),
    "base_gguf": ((Format.gguf,), "only format=gguf copies the tensors of another file"),
    "weight_type": ((Format.gguf,), "only format=gguf writes the weights in another type"),
}
"""Formats that read a key, and what to do in the others."""


def source_directory(args: ExportConfig) -> Path:
    """Return the requested model directory; `ConfigError` names the key that is missing or wrong."""
    require((args.run is None) != (args.model is None), "run", args.run, "name either run=FOLDER or model=DIR")
    require(bool(args.output), "output", args.output or None, "name the directory to write, output=DIR")
    require_at_most(args, "", {"length": MOST_TOKENS})
    _require_applicable(args)
    output = Path(str(args.output))
    files.require_writable_folder("output", output, output.parent, files.SAVING + output.name)
    # A dangling link is in the way too.
    require(not os.path.lexists(output), "output", args.output, "exists already; name another directory")
    if args.model is not None:
        _require_field(args, args.model, "model", args.model, "no directory with a CLEX field in it")
        _require_no_mask(args, Path(args.model).resolve().parent)
        require(Path(args.model).is_dir(), "model", args.model, "no such directory; `hf download` the model first")
        return Path(args.model)
    final = Path(str(args.run)) / saved_config.FINAL
    require(final.is_dir(), "run", args.run, "no final/ in it; give the output_dir of a finished training run")
    loading.require_whole(Path(str(args.run)))
    _require_field(args, str(final), "run", args.run, "was trained without CLEX: it has nothing to export")
    _require_no_mask(args, Path(str(args.run)))
    return final


def _require_applicable(args: ExportConfig) -> None:
    """Refuse keys that the format does not read."""
    for key, (formats, remedy) in APPLIES.items():
        value = getattr(args, key)
        text = value.value if isinstance(value, Enum) else value
        require(value is None or args.format in formats, key, text, remedy)
    base = args.base_gguf
    require(base is None or Path(base).is_file(), "base_gguf", base, "no such file")
    require(
        base is None or args.weight_type is None,
        "weight_type",
        args.weight_type.value if args.weight_type else None,
        "tensors of base_gguf are copied in the type that they have; leave the key out",
    )


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
        MASKED,
    )


def records(args: ExportConfig, directory: Path) -> Source:
    """Read the records of the model directory."""
    return read_source(ModelConfig(path=str(directory), trust_remote_code=args.trust_remote_code))


def scale_factors(args: ExportConfig, source: Source, many: bool = False) -> list[float]:
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


def folds(args: ExportConfig, source: Source) -> bool:
    """Return True if log-scaling is folded; `ConfigError` for a policy, which only the official layout has."""
    allowed = (None, Scaling.folded, Scaling.off)
    require(
        args.log_scale in allowed,
        "log_scale",
        args.log_scale.name if args.log_scale else None,
        "an engine cannot follow the length; `folded` puts the constant of one length into the weights, `off` leaves "
        "it out",
    )
    require(
        args.log_scale is not Scaling.folded or source.log_scale is not LogScale.off,
        "log_scale",
        "folded",
        "the run has scaling.log_scale=off: there is nothing to fold; leave the key out",
    )
    if args.log_scale is Scaling.off and source.log_scale is not LogScale.off:
        logger.warning("log_scale=off: the run has log_scale=%s, which this export lacks", source.log_scale.name)
    return args.log_scale is not Scaling.off and source.log_scale is not LogScale.off


def measured(args: ExportConfig) -> list[Measured]:
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
