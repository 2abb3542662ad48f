"""Read a saved directory or hub model without its weights: RoPE by layer type, layers, CLEX field, engines.

The model is built on the meta device from config.json as plain transformers reads it. A directory with a CLEX field
has a second answer: the table at the t of a length, which this project loads.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from clex_train.config.model import ModelConfig
from clex_train.inspection import layers, spectra
from clex_train.inspection.engines import llama_cpp, sglang, transformers_library, vllm
from clex_train.inspection.engines.verdict import Engine
from clex_train.inspection.facts import MAX, ORIGINAL, TOKENIZER_CONFIG, Facts, FieldFacts, original_len
from clex_train.inspection.reading import Field, Reading
from clex_train.inspection.spectra import SAME, LayerRope, relative_difference
from clex_train.model_config.context_length import LOCAL_LAYER_TYPES, ContextLength, stated_length
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import architecture, hub, official
from clex_train.models import directory as model_directory
from clex_train.rope import probe
from clex_train.scaling.frequency_table import TABLE, FrequencyTable, scale_grid
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils import records
from clex_train.utils.errors import ConfigError, InputError, require

ENGINES: tuple[Engine, ...] = (transformers_library.verdict, vllm.verdict, llama_cpp.verdict, sglang.verdict)
EXPORT_RECORD = "clex_export.json"


def inspect(model: ModelConfig, length: int | None = None) -> Reading:
    """Read a model for sequences of `length` tokens; by default the most that it serves.

    Raises:
        ConfigError: config.json cannot be read, the model has no RoPE or cannot be built, or a CLEX table does not
            reach `length`.
    """
    base = _base_config(model)
    config = _stock_config(model, base)
    text: Any = config.get_text_config()
    table = _table(model, base)
    length, source = _length(length, table, text)
    built, refused = _built(model, config, base, has_field=table is not None)
    refused = refused or _unstated(model)
    ropes = spectra.read(built, length)
    own = ropes if base is config else spectra.read(model_on_meta(base, model.trust_remote_code), length)
    field = None if table is None else _field(table, ropes, own, length, refused, _log_scale(model))
    facts = Facts(
        raw=_raw(model, "config.json"),
        config=text,
        architecture=type(built).__name__,
        ropes=ropes,
        interleaved=_layout(built) == "interleaved",
        tokenizer_len=_tokenizer_len(model),
        field=None if field is None else field.facts,
    )
    return Reading(
        name=architecture.name(model),
        model_type=config.model_type,
        architecture=facts.architecture,
        length=length,
        length_source=source,
        context_len=_context(model, field, facts),
        ropes=ropes,
        layers=layers.read(built, ropes),
        field=field,
        verdicts=tuple(engine(facts) for engine in ENGINES),
    )


def _base_config(model: ModelConfig) -> PretrainedConfig:
    """Read the config that this project starts from, in its own words where code of the model's own is needed."""
    try:
        return architecture.to_read(model)
    except InputError:
        own = _raw(model, "config.json").get("auto_map")
        code = str(own.get("AutoConfig")).partition(".")[0] if isinstance(own, dict) else None
        require(
            code is None or model.trust_remote_code,
            "trust_remote_code",
            "false",
            f"{model.path} has code of its own ({code}.py) that reads its config; read it, and set it to true",
        )
        raise


def _stock_config(model: ModelConfig, base: PretrainedConfig) -> PretrainedConfig:
    """Read config.json as plain transformers does: this project may start a CLEX model from another RoPE."""
    path = str(model.path)
    if official.is_official(Path(path)) or _unstated(model) is not None:
        # transformers refuses its rope type or its family; the stock model is all that there is to compare.
        return base
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, **hub.options(path)}
    return AutoConfig.from_pretrained(path, **options)


def _unstated(model: ModelConfig) -> str | None:
    """Return the reason why other programs refuse a CLEX directory; None if they read it."""
    directory = Path(str(model.path))
    return model_directory.read_record(directory).unstated if model_directory.has_clex(directory) else None


def _built(
    model: ModelConfig, config: PretrainedConfig, base: PretrainedConfig, has_field: bool
) -> tuple[PreTrainedModel, str | None]:
    """Build the model of config.json on the meta device; for a CLEX model that plain transformers refuses, its base.

    Also return the reason of the refusal.
    """
    try:
        return model_on_meta(config, model.trust_remote_code), None
    except ConfigError as error:
        if not has_field:
            raise
        return model_on_meta(base, model.trust_remote_code), error.remedy


def _raw(model: ModelConfig, file: str) -> dict[str, Any]:
    """Read a JSON file of the model as written, its text part merged in; empty if there is none."""
    path = str(model.path)
    options = {"revision": model.revision, "_configuration_file": file, **hub.options(path)}
    try:
        found, _ = PretrainedConfig.get_config_dict(path, **options)
    except (OSError, ValueError):  # no such file in the directory, on the hub or in its cache
        return {}
    text = found.get("text_config")
    return {**found, **text} if isinstance(text, dict) else found


def _tokenizer_len(model: ModelConfig) -> int | None:
    value = _raw(model, TOKENIZER_CONFIG).get("model_max_length")
    # Tokenizers without a limit write 1e30.
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1e15 else None


def _table(model: ModelConfig, base: PretrainedConfig) -> FrequencyTable | None:
    """Read or solve the table of a directory's CLEX field; None without one."""
    directory = Path(str(model.path))
    if model_directory.has_clex(directory):
        record = model_directory.read_record(directory)
        table = FrequencyTable.load(directory / TABLE)
        return dataclasses.replace(table, context_len=record.context_len)
    if not official.is_official(directory):
        return None
    traits = probe.require_rotary(base, model.trust_remote_code)
    field = official.read_official_field(directory, traits.base[traits.scaled].inv_freq)
    return dataclasses.replace(field.clex.table(scale_grid(field.clex.t_max)), context_len=field.context_len)


def _length(asked: int | None, table: FrequencyTable | None, text: Any) -> tuple[int, str]:
    """Return the length to look at, and its source."""
    if asked is not None:
        require(2 <= asked <= 2**40, "length", asked, "a number of tokens from 2")
        return asked, "length"
    if table is not None and table.context_len:
        return int(table.t_max * table.context_len), "t_max * L"
    served = stated_length(text, MAX, "length")
    require(served is not None, "length", None, f"config.json has no {MAX}; name a number of tokens, length=N")
    assert served is not None
    return served, MAX


def _log_scale(model: ModelConfig) -> str:
    """Return the policy of log-scaling of a directory with a CLEX field."""
    directory = Path(str(model.path))
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).log_scale
    return official.log_scale_policy(directory)


def _field(
    table: FrequencyTable,
    ropes: Sequence[LayerRope],
    own: Sequence[LayerRope],
    length: int,
    refused: str | None,
    log_scale: str,
) -> Field:
    """Return the field at the t of a length, compared with the RoPE of config.json; `own` is that of the base."""
    assert table.context_len is not None
    reach = int(table.t_max * table.context_len)
    require(length <= reach, "length", length, f"the CLEX table ends at t_max * L = {reach:,} tokens; name fewer")
    spectrum = table.least_upper_bound(length, table.context_len)
    rope, base = _scaled(ropes), _scaled(own)
    require(
        rope.num_pairs == table.num_pairs,
        "model",
        None,
        f"its CLEX table has {table.num_pairs} pairs, but its config.json {rope.num_pairs}; copy the directory again",
    )
    differences = relative_difference(rope.inv_freq, spectrum.inv_freq)
    by_t = relative_difference(rope.inv_freq, table.inv_freq).amax(dim=-1)
    nearest, pair = int(by_t.argmin()), int(differences.argmax())
    loaded_t = float(table.t[nearest]) if float(by_t[nearest]) < SAME else None
    # Neighbours on a grid may be equal up to rounding.
    loaded_t = spectrum.t if float(differences[pair]) < SAME else loaded_t
    facts = FieldFacts(spectrum.t, table.context_len, loaded_t, float(differences[pair]), pair, refused, log_scale)
    # The table's factor multiplies the base's own.
    factor = spectrum.attention_factor * base.attention_factor
    return Field(Spectrum(spectrum.inv_freq, spectrum.t, factor), rope.name, table.t_max, facts)


def _scaled(ropes: Sequence[LayerRope]) -> LayerRope:
    """Return the RoPE of the layers that see the whole context."""
    return next(rope for rope in ropes if rope.name not in LOCAL_LAYER_TYPES)


def _layout(built: Any) -> str | None:
    """Return the layout of the pairs; None for a rotary module that cannot be probed."""
    try:
        return probe.probe(probe.find_rotary(built).module, built.config).layout
    except InputError:
        return None


def _context(model: ModelConfig, field: Field | None, facts: Facts) -> ContextLength | None:
    """Return L, the length that plain RoPE was trained on, where something states it."""
    if model.context_len is not None:
        return ContextLength(model.context_len, "context_len")
    if field is not None:
        return ContextLength(field.facts.context_len, "CLEX field")
    return next(_stated_contexts(model, facts), None)


def _stated_contexts(model: ModelConfig, facts: Facts) -> Iterator[ContextLength]:
    recorded = _recorded(Path(str(model.path)) / EXPORT_RECORD)
    if recorded is not None:
        yield ContextLength(recorded, EXPORT_RECORD)
    max_len = facts.max_len
    scaled = [each for each in facts.sets if each.get("rope_type") not in ("default", "proportional", "dynamic")]
    for each in scaled:
        original = original_len(each) or getattr(facts.config, ORIGINAL, None)
        # An export of one t writes the same length twice, which says nothing about the length before scaling.
        if original and (original != max_len or each["rope_type"] != "longrope"):
            yield ContextLength(int(original), ORIGINAL)
    if not scaled and max_len is not None:
        yield ContextLength(max_len, MAX)


def _recorded(path: Path) -> int | None:
    """Read L from the record of an export; None without one."""
    try:
        facts = records.read_json(path)
    except FileNotFoundError:
        return None
    length = facts.get("context_len") if isinstance(facts, dict) else None
    if not isinstance(length, int) or length < 2:
        raise ConfigError(path, None, "no context_len in it; export the model again")
    return length
