"""Refuse weights that are not those of the architecture, from the headers of their files alone.

transformers draws what a checkpoint lacks at random and drops what it does not know, with a table in its log. Here
names and shapes are matched by its own loader on the meta device, where 7B takes a second and no memory: renamed and
merged tensors, tied ones and those that a family ignores are its business. Nothing is trained or evaluated before that.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clex_train.config.model import ModelConfig
from clex_train.models import official
from clex_train.models.directory import has_weights
from clex_train.models.weight_files import NotThere, Stored, files, have_equal_values, named, read_headers
from clex_train.rope.probe import model_on_meta
from clex_train.utils import distributed, log
from clex_train.utils.bounds import require
from clex_train.utils.errors import ConfigError, first_line

Report = Mapping[str, Any]
"""The loading info of transformers: missing_keys, unexpected_keys, mismatched_keys."""

RANDOM = "or draw random ones with model.config=DIR model.path=null"
REPORT = "LOAD REPORT"
"""In the title of transformers' table of missing, unexpected and mis-shaped tensors."""
CONSTANTS = (".masked_bias", ".inv_freq")
MASKS = (".attn.bias", ".attention.bias")
"""Buffers of old checkpoints of GPT-2, GPT-Neo and Llama that models compute by themselves. A causal mask shares its
name with a real bias, and is known by its shape."""
ADAPTER = "adapter_config.json"

logger = log.get(__name__)


def check(model: ModelConfig, arch: PretrainedConfig) -> None:
    """Refuse a `model.path` whose weights cannot be used whole; `ValueError` names the file or the tensors.

    A hub name is checked here if the cache has all of its files, else once they have been loaded (`check_loaded`).
    """
    if model.path is None or not model.is_pretrained:
        return
    require_unquantised(model.path, arch)
    directory = _local(model)
    if directory and (directory == Path(model.path) or _has_all_files(directory)):
        _check_directory(directory, model, arch)


def check_loaded(model: ModelConfig, arch: PretrainedConfig, report: Report) -> None:
    """Judge the report of transformers about the weights that it has loaded.

    Under ZeRO-3 it says only what is missing, so the files of a hub name, which are in the cache now, are compared.
    Call it once transformers has stopped to shard what is built: a sharded model has no place on the meta device.
    """
    directory = _local(model)
    if directory and directory != Path(str(model.path)):
        _check_directory(directory, model, arch)
    is_open = directory and any(name.endswith(MASKS) for name in report["unexpected_keys"])
    refuse(report, model, read_headers(directory).tensors if directory and is_open else {})


def require_unquantised(path: str, arch: PretrainedConfig) -> None:
    """Refuse weights of a few bits, which cannot be trained whole.

    fp8 and mxfp4 too: transformers turns them into floating point only where the GPU has no kernel for them.
    """
    config = getattr(arch, "quantization_config", None)
    facts = config if isinstance(config, dict) else vars(config) if config is not None else {}
    method = getattr(facts.get("quant_method"), "value", facts.get("quant_method"))
    require(
        config is None,
        "model.path",
        path,
        f"its weights are quantised ({method}) and cannot be trained whole; give the model that they were made from, "
        "or a copy of them in bfloat16",
    )


def refuse(report: Report, model: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` naming the tensors that weights and architecture do not share, but for those allowed.

    `tensors` are those of the weights, for the shapes of what may be a constant.
    """
    left_out = [name for name in report["unexpected_keys"] if not _is_constant(name, tensors.get(name))]
    missing, unexpected = (_beyond(names, model.allow_missing) for names in (report["missing_keys"], left_out))
    faults, remedy = [], "copy config.json and weights of one model again"
    if prefix := _prefix(missing, unexpected):
        faults.append(f"the names of its tensors begin with `{prefix}`: {named(unexpected)}")
        remedy = _without(prefix)
    elif missing or unexpected:
        faults += [f"its weights lack {named(missing)}, which would be drawn at random"] if missing else []
        faults += [f"its config.json has no {named(unexpected)}, which would be left out"] if unexpected else []
        remedy += f", or name what may differ in {model.PREFIX}allow_missing"
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        others = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        faults.append(f"{name} is {[*found]} in its weights and {[*expected]} by its config.json{others}")
    if faults:
        raise ConfigError("model.path", model.path, f"{'; '.join(faults)}; {remedy}")


def announce(report: Report, model: ModelConfig) -> None:
    """Name in the log what `model.allow_missing` had drawn or left out."""
    patterns = list(model.allow_missing)
    for kind, what in (("missing", "drawn from the seed"), ("unexpected", "left out")):
        names = [name for name in sorted(report[f"{kind}_keys"]) if _matches(name, patterns)]
        if names:
            logger.warning("%sallow_missing: %s: %s", model.PREFIX, what, ", ".join(names))


def require_finite(model: nn.Module, path: str) -> None:
    """Refuse loaded weights with a number that is not finite on any rank. Collective."""
    name = spoilt_parameter(model)
    require(
        name is None,
        "model.path",
        path,
        f"the weights of {name} are not finite: copy them again, or give others, such as an earlier checkpoint",
    )


def spoilt_parameter(model: nn.Module) -> str | None:
    """Find the first parameter with a number that is not finite on any rank, None if there is none. Collective."""
    own = (name for name, parameter in model.named_parameters() if not _is_finite(parameter))
    return next(filter(None, distributed.gather_objects(next(own, None))), None)


def _is_finite(parameter: Tensor) -> bool:
    # Under ZeRO-3 a parameter is empty between forwards, and this rank's share of it is beside it.
    own: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    # A sum takes no memory and is finite unless a number is not, or the sum overflows.
    return bool(own.sum(dtype=torch.float32).isfinite()) or bool(own.isfinite().all())


@dataclass(frozen=True)
class Comparison:
    """How tensors fit an architecture."""

    report: Report
    parameters: frozenset[str]
    """Names of the architecture's parameters."""
    tied: Mapping[str, str]
    """Parameters that the architecture makes one with another."""


def compare(arch: PretrainedConfig, tensors: Mapping[str, Tensor], trust_remote_code: bool = False) -> Comparison:
    """Match tensors on the meta device with an architecture, by transformers' own loader."""
    model_class = type(model_on_meta(arch, trust_remote_code))
    with quiet():
        model, report = model_class.from_pretrained(
            None,
            config=arch,
            state_dict={name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()},
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return Comparison(report, parameters, model.get_expanded_tied_weights_keys(all_submodels=True))


def _check_directory(directory: Path, model: ModelConfig, arch: PretrainedConfig) -> None:
    require(
        not (directory / ADAPTER).exists(),
        "model.path",
        directory,
        f"holds an adapter ({ADAPTER}); merge it into its base (merge_and_unload) and give what save_pretrained writes",
    )
    is_trained = model.PREFIX == ModelConfig.PREFIX
    stored = read_headers(directory, ", " + RANDOM if is_trained else "")
    tensors = stored.tensors
    if official.is_official(directory):
        tensors = {name: tensor for name, tensor in tensors.items() if official.CLEX_LAYER not in name}
    odd = {name for name, tensor in tensors.items() if not _is_trainable(tensor.dtype)}
    try:
        matched = compare(arch, tensors, model.trust_remote_code)
        # What is missing without them is what they were read for.
        without = {name: tensor for name, tensor in tensors.items() if name not in odd}
        floats = compare(arch, without, model.trust_remote_code) if odd else matched
    except Exception as error:  # whatever the code of a family raises over tensors that are not its own
        raise ConfigError(
            "model.path",
            directory,
            f"its weights cannot be put into its architecture ({first_line(error)}); copy "
            "config.json and weights of one model again",
        ) from error
    refuse(matched.report, model, tensors)
    # Merged ones have fewer parts without them, and another shape.
    needed = odd | {*floats.report["missing_keys"]} | {name for name, *_ in floats.report["mismatched_keys"]}
    needed = (needed - {*matched.report["missing_keys"]}) & matched.parameters
    _require_floats(model, sorted(needed), {str(tensors[name].dtype) for name in odd})
    for target, source in matched.tied.items():
        _require_equal(model, stored, target, source)


def _is_trainable(dtype: torch.dtype) -> bool:
    """Return True for floating point of 16 bits and more: a number of 8 bits means nothing without its scale."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _require_floats(model: ModelConfig, names: list[str], dtypes: set[str]) -> None:
    found = " and ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    require(
        not names,
        "model.path",
        model.path,
        f"its weights hold {named(names)} as {found}, which would be cast as they are, without the scales of a "
        "quantisation; give a copy of the model in bfloat16",
    )


def _require_equal(model: ModelConfig, stored: Stored, target: str, source: str) -> None:
    """Refuse two tensors that the architecture ties and the weights hold with different values.

    transformers reads both, and under ZeRO-3 the first alone.
    """
    names = [name for name in (_stored_as(target, stored), _stored_as(source, stored)) if name]
    if len({*names}) < 2 or stored.tensors[names[0]].shape != stored.tensors[names[1]].shape:
        return
    require(
        have_equal_values(stored, *names),
        "model.path",
        model.path,
        f"its weights hold {names[0]} and {names[1]} with different values, and its config.json makes them one tensor "
        f"(tie_word_embeddings); set tie_word_embeddings=false in config.json, or remove {names[0]} from the weights",
    )


def _stored_as(name: str, stored: Stored) -> str | None:
    """Find a parameter in the files, where its name may have the prefix of a body or lack it."""
    if name in stored.tensors:
        return name
    like = [each for each in stored.tensors if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return like[0] if len(like) == 1 else None


def _local(model: ModelConfig) -> Path | None:
    """Find the directory of a model, for a hub name in the cache; None where its weights are not there."""
    directory = Path(str(model.path))
    if directory.is_dir():
        return directory
    cached = try_to_load_from_cache(str(model.path), "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) and has_weights(str(Path(cached).parent)) else None


def _has_all_files(snapshot: Path) -> bool:
    """Tell whether the cache has every weight file of a hub name; what it lacks is downloaded as it is loaded."""
    try:
        return bool(files(snapshot))
    except NotThere:
        return False


def _is_constant(name: str, tensor: Tensor | None) -> bool:
    """Tell a buffer that the model computes by itself: frequencies, the fill value of a mask, a causal mask."""
    if name.endswith(CONSTANTS):
        return True
    is_square = tensor is not None and tensor.dim() == 4 and tensor.shape == (1, 1, *2 * tensor.shape[-1:])
    return name.endswith(MASKS) and is_square


def _beyond(names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    patterns = list(allowed)
    return sorted(name for name in names if not _matches(name, patterns))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """Find what wrappers such as DDP, torch.compile and PEFT put before the names of most missing tensors."""
    known = set(missing)
    found = Counter(name[: -len(tail)] for name in unexpected for tail in _tails(name) if tail in known)
    if not found:
        return None
    prefix, count = found.most_common(1)[0]
    return prefix if 2 * count >= len(missing) else None


def _tails(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts)))


def _without(prefix: str) -> str:
    if "base_model" in prefix:
        return "merge the adapter into its base (merge_and_unload) and give what save_pretrained writes"
    return f"save the model inside the wrapper, or rename them by name.removeprefix('{prefix}')"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own report and progress bars out of the log."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers' table of tensors out of the log while weights load: here they are refused or named in a line.

    Its other warnings stay. Were the table to get another title, it would be back beside that line.
    """
    source = logging.getLogger(PreTrainedModel.__module__)
    source.addFilter(_is_no_report)
    try:
        yield
    finally:
        source.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return REPORT not in record.getMessage()
