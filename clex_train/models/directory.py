"""Layout of a CLEX model on disk: a stock Hugging Face directory plus three files.

config.json, model*.safetensors, tokenizer files    the model at one t for any Hugging Face program (`export.final`)
clex.json                                           L, t_max, shape and quirks of the field, RoPE of the base's config
clex.safetensors                                    the state of `scaling.clex.Clex`: weights, start, solver grid
frequencies.safetensors                             the table theta(t) that training, evaluation and export share
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from clex_train.config.scaling import LogScale
from clex_train.model_config.rope_keys import set_rope
from clex_train.models.weight_files import WEIGHT_FILES
from clex_train.scaling.clex import Clex
from clex_train.scaling.fields import Shape
from clex_train.scaling.frequency_table import MAX_FACTORS, TABLE, FrequencyTable
from clex_train.scaling.solver import MAX_STEPS
from clex_train.utils import records
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile, require_regular
from clex_train.utils.records import read_json

CLEX_JSON, CLEX_TENSORS = "clex.json", "clex.safetensors"
FORMAT = 3
"""Since 2, config.json states the RoPE of one t, and clex.json keeps the base model's; since 3, it names the field."""
UNSTATED_PREFIX = "clex_"
"""Put before the family in a config.json that states no t."""


@dataclass(frozen=True)
class ClexRecord:
    """Contents of `clex.json`."""

    context_len: Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
    """L of the base model in tokens."""
    t_max: Annotated[float, Meta(ge=1, le=MAX_FACTORS)]
    act: str
    param_factor: Annotated[float, Meta(gt=0)]
    """Hidden width of the vector field, as a multiple of the rotary dimension."""
    official_ntk_base: bool
    tolerance: Annotated[float, Meta(gt=0)]
    """Relative error of the ODE solver."""
    log_scale: str
    """A value of `LogScale`."""
    format: int = 1
    field: str = Clex.kind
    """Kind of vector field, `scaling.field`; the paper's before format 3."""
    base_rope: dict[str, Any] | None = None
    """Values of `ROPE_KEYS` in the base model's config.json; None in format 1, whose config.json still has them."""
    stated_t: float | None = None
    """Scale factor of the RoPE in config.json; None if it states none (the reason is in `unstated`)."""
    lambda_mask: bool = False
    """True if the model was trained with LM-Infinite's mask, which no other program has."""
    unstated: str | None = None
    """Reason why no config.json expresses the model, which plain transformers then refuses to build."""
    averaged: list[int] | None = None
    """Steps of the checkpoints whose mean the model is; None for the weights of one step."""


def has_clex(directory: Path) -> bool:
    """Return True if the directory was written by a CLEX run."""
    return (directory / CLEX_JSON).is_file()


def has_weights(directory: Path | str) -> bool:
    """Return True if the directory has weight files that transformers reads, or an index of them."""
    return any((Path(directory) / name).exists() for name in WEIGHT_FILES)


def write_clex(
    directory: Path,
    clex: Clex,
    table: FrequencyTable,
    context_len: int,
    log_scale: LogScale = LogScale.off,
    stated: Mapping[str, Any] | None = None,
) -> None:
    """Write the three CLEX files into a model directory.

    `stated` has the optional fields of the record; None for a config.json with the base's RoPE.
    """
    # The record describes the field itself, not the configuration: a continued field keeps its own shape and quirks.
    num_pairs, hidden = clex.up.shape
    record = ClexRecord(
        context_len=context_len,
        t_max=clex.t_max,
        act=clex.act,
        param_factor=hidden / (2 * num_pairs),
        official_ntk_base=clex.official_ntk_base,
        tolerance=clex.tolerance,
        log_scale=log_scale.value,
        format=_format(clex, stated),
        field=clex.kind,
        **(stated or {}),
    )
    (directory / CLEX_JSON).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    save_file(clex.state_dict(), directory / CLEX_TENSORS)
    table.save(directory / TABLE)


def _format(clex: Clex, stated: Mapping[str, Any] | None) -> int:
    """Return the least format that describes the directory, so that earlier programs read what they can."""
    # A program that does not know the kind would build the paper's field from these weights, so it must refuse.
    if clex.kind != Clex.kind:
        return FORMAT
    return 1 if stated is None else 2


def refuse_elsewhere(directory: Path) -> None:
    """Name a family in config.json that no program knows, so that none builds the model with the RoPE of the base."""
    facts = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    facts["model_type"] = UNSTATED_PREFIX + facts["model_type"]
    facts["architectures"] = [UNSTATED_PREFIX + name for name in facts.get("architectures") or ()]
    # The code of the base would be run by this key, whatever the family.
    facts[UNSTATED_PREFIX + "auto_map"] = facts.pop("auto_map", None)
    (directory / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def restored_facts(directory: Path) -> dict[str, Any] | None:
    """Return config.json as it was before `refuse_elsewhere`; None for a directory that others can read."""
    if not has_clex(directory) or read_record(directory).unstated is None:
        return None
    facts: dict[str, Any] = read_json(directory / "config.json")
    facts["model_type"] = facts["model_type"].removeprefix(UNSTATED_PREFIX)
    facts["architectures"] = [name.removeprefix(UNSTATED_PREFIX) for name in facts["architectures"]]
    auto_map = facts.pop(UNSTATED_PREFIX + "auto_map", None)
    return facts | ({"auto_map": auto_map} if auto_map else {})


def with_base_rope(directory: Path, config: PretrainedConfig) -> PretrainedConfig:
    """Return the base's config where config.json of a CLEX directory states the RoPE of one t, else `config` itself."""
    values = read_record(directory).base_rope if has_clex(directory) else None
    try:
        return config if values is None else set_rope(config, values)
    except Exception as error:  # configs of transformers check the types of their fields in ways of their own
        reason = f"`base_rope` does not fit config.json ({first_line(error)}); copy the model directory again"
        raise ConfigError(directory / CLEX_JSON, None, reason) from error


def read_record(directory: Path) -> ClexRecord:
    """Read `clex.json`. Raises `ConfigError`, naming the file, when it is damaged or of a newer format."""
    path = directory / CLEX_JSON
    try:
        record = records.read_record(path, ClexRecord)
    except FileNotFoundError as error:
        raise ConfigError(path, None, "missing; copy the model directory again") from error
    except BadFile as error:
        raise ConfigError(path, None, f"not a CLEX record ({error.reason}); copy the model directory again") from error
    # Before the format: a policy of a newer version is the more specific message.
    if record.log_scale not in [policy.value for policy in LogScale]:
        raise ConfigError(path, None, f"log_scale={record.log_scale!r} is a policy unknown to this program; update it")
    if record.format > FORMAT:
        raise ConfigError(path, None, f"format {record.format} is newer than this program's {FORMAT}; update it")
    return record


def read_clex(directory: Path) -> tuple[Clex, FrequencyTable, ClexRecord]:
    """Read the vector field, its table and its record. Raises `ConfigError`, naming a damaged file."""
    record, path = read_record(directory), directory / CLEX_TENSORS
    try:
        require_regular(path)
        state = load_file(path)
        _require_described(state, record)
        shape = Shape(
            record.field,
            record.t_max,
            record.param_factor,
            record.act,
            record.official_ntk_base,
            record.tolerance,
        )
        clex = shape.build(state["base_inv_freq"], state.get("shares"))
        clex.load_state_dict(state)
    except Exception as error:  # safetensors and torch raise many types for tensors that do not form a field
        reason = first_line(error)
        raise ConfigError(path, None, f"not the field that {CLEX_JSON} describes ({reason}); copy it again") from error
    # A NaN would turn every frequency into NaN, and every perplexity, with no hint at the cause.
    for name, weight in clex.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(path, None, f"`{name}` has weights that are not finite; copy it again")
    return clex, FrequencyTable.load(directory / TABLE), record


def _require_described(state: dict[str, torch.Tensor], record: ClexRecord) -> None:
    """Raise `ValueError` when the tensors contradict the record."""
    # Before the field is built: a damaged record could ask for any width, and a damaged grid for any number of steps.
    num_pairs, hidden = state["up"].shape
    if state["base_inv_freq"].shape != (num_pairs,) or hidden != max(1, round(record.param_factor * 2 * num_pairs)):
        raise ValueError(f"`up` is {num_pairs} x {hidden}, param_factor={record.param_factor:g}")
    if not 1 <= int(state["steps"]) <= MAX_STEPS:
        raise ValueError(f"`steps` is {int(state['steps'])}, not in [1, {MAX_STEPS}]")
