"""Check that weights fit their architecture, from the headers of their files alone.

transformers initializes missing tensors at random and drops unknown ones, with no more than a table in its log. Here
they are errors, unless `model.allow_missing` permits them.
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
from clex_train.engine.nan_check import non_finite_parameter
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import official
from clex_train.models.directory import has_weights
from clex_train.models.weight_files import NotThere, Stored, files, have_equal_values, named, read_headers
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, first_line, require

Report = Mapping[str, Any]
"""Loading info of transformers: missing_keys, unexpected_keys, mismatched_keys."""

RANDOM = "or draw random ones with model.config=DIR model.path=null"
REPORT = "LOAD REPORT"
"""Part of the title of transformers' table of missing, unexpected and mismatched tensors."""
CONSTANTS = (".masked_bias", ".inv_freq")
MASKS = (".attn.bias", ".attention.bias")
"""Buffers in old checkpoints of GPT-2, GPT-Neo and Llama, which today's models compute. A causal mask has the name of
a real bias, and is recognized by its shape."""
ADAPTER = "adapter_config.json"

logger = log.get(__name__)


def check(model: ModelConfig, arch: PretrainedConfig) -> None:
    """Raise `InputError`, naming the file or the tensors, unless the weights of `model.path` fit the architecture.

    A hub name is checked here if the cache has all of its files, else after loading (`check_loaded`).
    """
    if model.path is None or not model.is_pretrained:
        return
    require_unquantised(model.path, arch)
    directory = _local(model)
    if directory and (directory == Path(model.path) or _has_all_files(directory)):
        _check_directory(directory, model, arch)


def check_loaded(model: ModelConfig, arch: PretrainedConfig, report: Report) -> None:
    """Raise `InputError` when loaded weights did not fit, by transformers' report.

    Call it after transformers has stopped sharding new models: it may build one on the meta device.
    """
    # Under ZeRO-3 the report has missing tensors only. The files of a hub name are in the cache now, so compare them.
    directory = _local(model)
    if directory and directory != Path(str(model.path)):
        _check_directory(directory, model, arch)
    is_open = directory and any(name.endswith(MASKS) for name in report["unexpected_keys"])
    refuse(report, model, read_headers(directory).tensors if directory and is_open else {})


def require_unquantised(path: str, arch: PretrainedConfig) -> None:
    """Raise `ConfigError` for quantized weights, which cannot be trained in full."""
    # fp8 and mxfp4 too: transformers dequantizes them only on GPUs without kernels for them.
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
    """Raise `ConfigError`, naming missing, unexpected and mismatched tensors that are not allowed to differ.

    `tensors` of the weights by name: their shapes distinguish constants from parameters.
    """
    left_out = [name for name in report["unexpected_keys"] if not _is_constant(name, tensors.get(name))]
    missing, unexpected = (_beyond(names, model.allow_missing) for names in (report["missing_keys"], left_out))
    faults, remedy = [], "copy config.json and weights of one model again"
    # One common prefix explains hundreds of names at once.
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
    """Log the tensors that `model.allow_missing` initialized at random or left out."""
    patterns = list(model.allow_missing)
    for kind, what in (("missing", "drawn from the seed"), ("unexpected", "left out")):
        names = [name for name in sorted(report[f"{kind}_keys"]) if _matches(name, patterns)]
        if names:
            logger.warning("%sallow_missing: %s: %s", model.PREFIX, what, ", ".join(names))


def require_finite(model: nn.Module, path: str) -> None:
    """Raise `ConfigError` when loaded weights are not finite on any rank. Collective."""
    name = non_finite_parameter(model)
    require(
        name is None,
        "model.path",
        path,
        f"the weights of {name} are not finite: copy them again, or give others, such as an earlier checkpoint",
    )


@dataclass(frozen=True)
class Comparison:
    """Result of matching tensors with an architecture."""

    report: Report
    parameters: frozenset[str]
    """Names of the architecture's parameters."""
    tied: Mapping[str, str]
    """Tied parameters: target to source."""


def compare(arch: PretrainedConfig, tensors: Mapping[str, Tensor], trust_remote_code: bool = False) -> Comparison:
    """Match tensors with an architecture on the meta device, using transformers' own loader."""
    # Its loader knows renamed, merged, tied and ignored tensors of every family. On the meta device, 7B parameters
    # take a second and no memory.
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
        # Load again without the odd tensors: those that become missing show what they were used for.
        without = {name: tensor for name, tensor in tensors.items() if name not in odd}
        floats = compare(arch, without, model.trust_remote_code) if odd else matched
    except Exception as error:  # the code of a family raises many types for foreign tensors
        raise ConfigError(
            "model.path",
            directory,
            f"its weights do not fit its architecture ({first_line(error)}); copy "
            "config.json and weights of one model again",
        ) from error
    refuse(matched.report, model, tensors)
    # A merged tensor does not go missing without one of its parts: it gets another shape.
    needed = odd | {*floats.report["missing_keys"]} | {name for name, *_ in floats.report["mismatched_keys"]}
    needed = (needed - {*matched.report["missing_keys"]}) & matched.parameters
    _require_floats(model, sorted(needed), {str(tensors[name].dtype) for name in odd})
    for target, source in matched.tied.items():
        _require_equal(model, stored, target, source)


def _is_trainable(dtype: torch.dtype) -> bool:
    """Return True if a dtype is floating point of at least 16 bits."""
    # Values of 8 bits mean nothing without their scales, which transformers would drop.
    return dtype.is_floating_point and dtype.itemsize > 1


def _require_floats(model: ModelConfig, names: list[str], dtypes: set[str]) -> None:
    found = " and ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
    require(
        not names,
        "model.path",
        model.path,
        f"its weights hold {named(names)} as {found}, which would be cast without the scales of a "
        "quantisation; give a copy of the model in bfloat16",
    )


def _require_equal(model: ModelConfig, stored: Stored, target: str, source: str) -> None:
    """Raise `ConfigError` for tensors that the architecture ties but the weights have with different values."""
    # transformers reads both, but under ZeRO-3 only the first, so the two would give different models.
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
    """Find a parameter's name in the files, with or without the prefix of the model's body."""
    if name in stored.tensors:
        return name
    like = [each for each in stored.tensors if each.endswith(f".{name}") or name.endswith(f".{each}")]
    return like[0] if len(like) == 1 else None


def _local(model: ModelConfig) -> Path | None:
    """Return the local directory of a model, for a hub name the cached one; None if its weights are not local."""
    directory = Path(str(model.path))
    if directory.is_dir():
        return directory
    cached = try_to_load_from_cache(str(model.path), "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) and has_weights(str(Path(cached).parent)) else None


def _has_all_files(snapshot: Path) -> bool:
    """Return True if the cache has every weight file of a hub name."""
    try:
        return bool(files(snapshot))
    except NotThere:
        # Not an error: loading downloads the rest.
        return False


def _is_constant(name: str, tensor: Tensor | None) -> bool:
    """Return True if a tensor is a buffer that models compute: frequencies, a mask's fill value, a causal mask."""
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
    """Find the prefix that a wrapper such as DDP, torch.compile or PEFT put before most of the missing names."""
    known = set(missing)
    found = Counter(name[: -len(tail)] for name in unexpected for tail in _tails(name) if tail in known)
    if not found:
        return None
    # At least half: single names may end alike by chance.
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
    """Silence transformers' report and progress bars."""
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
    """Suppress transformers' table of tensors while weights load; other warnings remain."""
    # The table repeats what `refuse` and `announce` log. It is recognized by its title; should a later version change
    # it, the table is merely shown again.
    source = logging.getLogger(PreTrainedModel.__module__)
    source.addFilter(_is_no_report)
    try:
        yield
    finally:
        source.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return REPORT not in record.getMessage()
