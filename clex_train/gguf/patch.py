"""Add RoPE factors to an existing GGUF file, of any quantisation.

The file has to hold the trained weights, converted and quantised by any program from the plain config. Its tensors are
copied unchanged; keys of RoPE scaling and the context length are replaced. A file for every t: the factors cannot be
given to llama.cpp on its command line.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import PretrainedConfig

from clex_train.gguf import files
from clex_train.gguf.architectures import require_addable, scaling_fields
from clex_train.gguf.files import (
    LONGROPE,
    ROPE_FREQS,
    Content,
    Entry,
    Field,
    contents,
    factor_entries,
    gguf_package,
    number,
    require_factors,
    require_written,
)
from clex_train.models import weight_files
from clex_train.utils.errors import ConfigError, require

NORM = re.compile(r"(?:.*\.)?layers\.(\d+)\.input_layernorm\.weight")
GGUF_NORM = re.compile(r"blk\.(\d+)\.attn_norm\.weight")
LLAMA_CPP_BASE = 10_000.0
"""`rope.freq_base` of a file without the key."""


def plan_added_factors(
    base: Path,
    factors: Sequence[float],
    served_len: int,
    *,
    rope_theta: float,
    attention_factor: float = 1.0,
    config: PretrainedConfig | None = None,
    directory: Path | None = None,
) -> Content:
    """Return the copy of a GGUF file with factors.

    Args:
        base: GGUF file with the trained weights and plain RoPE.
        factors: F_j = plain theta_j of `rope_theta` / theta_j(t), one per pair of rotated dimensions.
        served_len: round(t * L), the context length of the file in tokens.
        rope_theta: base of the plain frequencies that the factors refer to; the file has to have the same.
        config: of the model whose weights the file has to have; None leaves its sizes unchecked.
        directory: of that model, whose norms the file has to have; None leaves them unchecked.
        attention_factor: factor of cos and sin; sqrt(s) is a scale s of the logits where whole heads are rotated.

    Raises:
        ConfigError: an architecture that ignores factors, a file that has some, another base or number of pairs,
            another model, a part of a split model.
        BadFile: not a GGUF file, or a damaged one.
    """
    reader = files.read(base)
    architecture = str(contents(reader, "general.architecture"))
    require_addable(base, architecture)
    _require_usable(reader, base)
    _require_same_rope(reader, base, architecture, rope_theta)
    if config is not None:
        _require_same_sizes(reader, base, architecture, config)
    if directory is not None:
        _require_same_norms(reader, base, directory)
    require_factors(factors, num_pairs(reader, architecture, base))
    fields = [
        *_kept_fields(reader, architecture),
        Field(f"{architecture}.context_length", served_len),
        *scaling_fields(architecture, attention_factor),
    ]
    # As the writer of phi3 says it: no border between a short and a long context below `served_len`.
    if architecture == "phi3":
        fields.append(Field("phi3.rope.scaling.original_context_length", served_len))
    entries = [*map(_entry, reader.tensors), *factor_entries(architecture, factors)]

    def verify(written: Any) -> None:
        _verify(written, reader, architecture, factors)

    return Content(architecture, fields, entries, verify, int(reader.alignment))


def num_pairs(reader: Any, architecture: str, base: Path) -> int:
    """Return the number of pairs of rotated dimensions of a file."""
    rotated = number(reader, f"{architecture}.rope.dimension_count")
    if rotated is None:
        # llama.cpp's own default: the whole head.
        rotated = number(reader, f"{architecture}.attention.key_length")
    if rotated is None:
        width, heads = (
            contents(reader, f"{architecture}.{key}") for key in ("embedding_length", "attention.head_count")
        )
        whole = isinstance(width, int) and isinstance(heads, int) and heads > 0
        require(whole, str(base), None, "does not say how many dimensions RoPE rotates; convert the model again")
        rotated = width // heads
    return int(rotated) // 2


def _require_usable(reader: Any, base: Path) -> None:
    names = {tensor.name for tensor in reader.tensors}
    if found := sorted(names & {ROPE_FREQS, *LONGROPE}):
        remedy = (
            f"has RoPE factors already ({found[0]}); convert the model again from a config.json whose rope_type is "
            "default, and give that file"
        )
        raise ConfigError("base_gguf", base, remedy)
    parts = number(reader, "split.count", 0) or 0
    require(parts <= 1, "base_gguf", base, f"one of {parts} parts; join them first: llama-gguf-split --merge")
    require(reader.byte_order == "I", "base_gguf", base, "has the byte order of another machine; convert it there")


def _require_same_rope(reader: Any, base: Path, architecture: str, rope_theta: float) -> None:
    found = number(reader, f"{architecture}.rope.freq_base", LLAMA_CPP_BASE)
    remedy = f"{base} has rope.freq_base {found:g}: it is another model, or was converted from another config.json"
    require(math.isclose(found or 0.0, rope_theta, rel_tol=1e-6), "rope_theta", rope_theta, remedy)


def _require_same_sizes(reader: Any, base: Path, architecture: str, config: PretrainedConfig) -> None:
    """Refuse the file of another model; which weights of the same sizes it has, no header says."""
    text: Any = config.get_text_config()
    sizes = {
        "block_count": text.num_hidden_layers,
        "embedding_length": text.hidden_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
    }
    for key, expected in sizes.items():
        found = contents(reader, f"{architecture}.{key}")
        remedy = f"{key} is {found}, and the model's is {expected}: it is another model"
        require(found is None or found == expected, "base_gguf", base, remedy)
    tokens = contents(reader, "tokenizer.ggml.tokens")
    # Converters pad the vocabulary or cut its padding.
    remedy = f"has {len(tokens or ())} tokens, and the model {text.vocab_size}: it is another model"
    require(not tokens or abs(len(tokens) - text.vocab_size) <= 512, "base_gguf", base, remedy)


def _require_same_norms(reader: Any, base: Path, directory: Path) -> None:
    """Refuse the weights of another training: converters keep norms in float32, whatever the matrices become."""
    places = weight_files.read_headers(directory).places
    stored = {match[1]: name for name in places if (match := NORM.fullmatch(name))}
    for tensor in reader.tensors:
        match = GGUF_NORM.fullmatch(tensor.name)
        name = None if match is None else stored.get(match[1])
        if name is None or tensor.tensor_type.name != "F32" or places[name].suffix != ".safetensors":
            continue
        with safe_open(places[name], "pt") as file:
            expected = file.get_tensor(name).float().numpy()
        same = tensor.data.shape == expected.shape and np.allclose(tensor.data, expected, rtol=1e-3, atol=1e-5)
        remedy = f"its {tensor.name} is not {name} of {directory}: other weights, such as those before training"
        require(same, "base_gguf", base, remedy)


def _kept_fields(reader: Any, architecture: str) -> list[Field]:
    """Return the keys of the header that stay, with their types."""
    replaced = f"{architecture}.rope.scaling."
    left_out = ("general.architecture", f"{architecture}.context_length")
    types = gguf_package().GGUFValueType
    kept = []
    for field in reader.fields.values():
        # `GGUF.*` are the reader's own; a flat scale is a scaling too, under its old name.
        if field.name.startswith(("GGUF.", replaced)) or field.name in (*left_out, f"{architecture}.rope.scale_linear"):
            continue
        is_array = field.types[0] == types.ARRAY
        # The reader flattens arrays of arrays, which no converter writes.
        require(len(field.types) <= 2, field.name, None, "is an array of arrays, which cannot be copied")
        # The writer cannot express an empty array, and llama.cpp reads a missing one alike.
        if not is_array or len(field.data):
            kept.append(Field(field.name, _value(field, types), field.types[0], field.types[-1] if is_array else None))
    return kept


def _value(field: Any, types: Any) -> Any:
    """Return the value of a key, text as the bytes of the file: a token need not be valid UTF-8."""
    if field.types[-1] != types.STRING:
        return field.contents()
    items = [bytes(field.parts[place]) for place in field.data]
    return items if field.types[0] == types.ARRAY else items[0]


def _entry(tensor: Any) -> Entry:
    data = tensor.data
    return Entry(tensor.name, tuple(data.shape), data.dtype, tensor.tensor_type, lambda: data)


def _verify(written: Any, reader: Any, architecture: str, factors: Sequence[float]) -> None:
    """Compare names, types and sizes; the data was copied from one file to the other."""
    known = {tensor.name: (tensor.tensor_type, tensor.n_bytes) for tensor in written.tensors}
    for tensor in reader.tensors:
        if known.get(tensor.name) != (tensor.tensor_type, tensor.n_bytes):
            raise RuntimeError(f"{tensor.name} read back from the file is another tensor")
    require_written(written, architecture, factors)
