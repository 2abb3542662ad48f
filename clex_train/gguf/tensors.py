"""Weights of a Hugging Face directory as tensors of a GGUF file, read one at a time.

llama.cpp's architecture `llama` rotates neighbouring components (2j, 2j + 1), transformers j and j + d/2. The rows of q
and k are therefore reordered within each head; phi3 keeps the order of transformers.
"""

import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clex_train.gguf.architectures import Form
from clex_train.gguf.files import Entry, gguf_package
from clex_train.models import weight_files
from clex_train.models.weight_files import Stored, named
from clex_train.utils.errors import ConfigError, require

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
BUFFERS = re.compile(r".*rotary_emb\.inv_freq|model\.clex_layer\..*")
"""Tensors of older or official directories that are not weights."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class WeightType(Enum):
    """Type of the matrices; vectors (norms, biases) are always F32."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"

    @property
    def file_type(self) -> int:
        """Return `general.file_type`."""
        return {"f32": 0, "f16": 1, "bf16": 32}[self.value]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of torch."""
        return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[self.value]


def stored_type(directory: Path) -> WeightType:
    """Return the type that the embedding is stored in."""
    dtype = weight_files.read_headers(directory).tensors[EMBEDDING].dtype
    return next((each for each in WeightType if each.dtype == dtype), WeightType.f32)


def weight_entries(directory: Path, form: Form, weight_type: WeightType, query_scale: float = 1.0) -> list[Entry]:
    """Return every weight of a directory as a tensor of the file.

    Args:
        directory: Hugging Face directory with plain weights.
        form: dimensions of the model.
        weight_type: type of the matrices.
        query_scale: factor of the queries, multiplied into the weights and biases that make them.

    Raises:
        ConfigError: a weight is missing, has another shape or no place in the architecture, or is quantised.
    """
    stored = weight_files.read_headers(directory)
    _require_plain(stored, directory)
    sources = _sources(stored, form)
    shapes, optional = _shapes(form), _bias_shapes(form)
    if absent := sorted(shapes.keys() - sources.keys()):
        raise ConfigError("model.path", directory, f"no weights for {named(absent)}; copy the directory again")
    if extra := sorted(sources.keys() - shapes.keys() - optional.keys()):
        remedy = f"{named(extra)} have no place in llama.cpp's architecture {form.architecture}"
        raise ConfigError("model.path", directory, remedy)
    expected = {**shapes, **{name: shape for name, shape in optional.items() if name in sources}}
    return [
        _entry(stored, name, sources[name], shape, form, weight_type, query_scale) for name, shape in expected.items()
    ]


def permute(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows (H * D, ...) of each head from j, j + D/2 to neighbours."""
    split = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)


def _entry(
    stored: Stored,
    name: str,
    sources: list[str],
    shape: tuple[int, ...],
    form: Form,
    weight_type: WeightType,
    query_scale: float,
) -> Entry:
    is_stack = len(shape) == 3
    part = shape[1:] if is_stack else shape
    for source in sources:
        found = tuple(stored.tensors[source].shape)
        require(found == part, source, list(found), f"config.json makes it {list(part)}; copy the directory again")
    require(len(sources) == (shape[0] if is_stack else 1), name, len(sources), "another number of stored tensors")
    # The router stays F32 too, as llama.cpp's converter has it: a rounded one may choose another expert.
    kind = WeightType.f32 if len(shape) == 1 or "ffn_gate_inp" in name else weight_type
    change = _change(name, form, query_scale)

    def read() -> NDArray[Any]:
        parts = [_converted(change(_tensor(stored, each)), kind, each) for each in sources]
        return np.stack(parts) if is_stack else parts[0]

    dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.int16}[kind.value]
    return Entry(name, shape, dtype, gguf_package().GGMLQuantizationType[kind.name.upper()], read)


def _tensor(stored: Stored, name: str) -> Tensor:
    return torch.cat(list(weight_files.pieces(stored.places[name], name)))


def _change(name: str, form: Form, query_scale: float) -> Callable[[Tensor], Tensor]:
    """Return what is done to a weight: rows reordered, queries scaled (in float32)."""
    part = name.split(".")[-2]
    is_llama = form.architecture == "llama"
    if part == "attn_k" and is_llama:
        return lambda rows: permute(rows, form.num_kv_heads)
    if part == "attn_q" and is_llama:
        return lambda rows: permute(_scaled(rows, query_scale), form.num_heads)
    if part == "attn_qkv":
        queries = form.num_heads * form.head_dim
        return lambda rows: torch.cat([_scaled(rows[:queries], query_scale), _scaled(rows[queries:], 1.0)])
    return lambda rows: rows


def _scaled(rows: Tensor, scale: float) -> Tensor:
    # Before the rounding to the type of the file, and exact where the scale is 1.
    return rows.float() * scale


def _converted(tensor: Tensor, kind: WeightType, name: str) -> NDArray[Any]:
    result = tensor.to(kind.dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        remedy = f"has values that are not finite in {kind.name}; write another type, bf16 or f32"
        raise ConfigError(name, None, remedy)
    # numpy has no bfloat16: its bytes as integers.
    plain = result.view(torch.int16) if kind is WeightType.bf16 else result
    array: NDArray[Any] = plain.numpy()
    return array


def _sources(stored: Stored, form: Form) -> dict[str, list[str]]:
    """Map each tensor of the file to the stored ones that make it, experts in their order."""
    gguf = gguf_package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[form.architecture.upper()], form.num_layers)
    found: dict[str, list[str]] = {}
    for source in stored.tensors:
        if BUFFERS.fullmatch(source) or (source == HEAD and _is_tied(stored, form)):
            continue
        if match := EXPERT.fullmatch(source):
            layer, _, part = match.groups()
            found.setdefault(f"blk.{layer}.{EXPERTS[part]}.weight", []).append(source)
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        found.setdefault(name or source, []).append(source)
    return {name: sorted(sources, key=_expert_number) for name, sources in found.items()}


def _expert_number(source: str) -> int:
    match = EXPERT.fullmatch(source)
    return int(match[2]) if match else 0


def _is_tied(stored: Stored, form: Form) -> bool:
    """Return True if the head is the embedding; a stored copy of it is left out."""
    if not form.tied or HEAD not in stored.tensors:
        return form.tied
    same = weight_files.have_equal_values(stored, EMBEDDING, HEAD)
    require(same, "tie_word_embeddings", True, f"{HEAD} is stored and differs from the embedding; say which is meant")
    return True


def _require_plain(stored: Stored, directory: Path) -> None:
    if quantised := sorted(name for name, tensor in stored.tensors.items() if tensor.dtype not in FLOATS):
        dtype = str(stored.tensors[quantised[0]].dtype).removeprefix("torch.")
        remedy = f"{named(quantised)} stored as {dtype}; give the weights in float32, float16 or bfloat16"
        raise ConfigError("model.path", directory, remedy)


def _shapes(form: Form) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the architecture asks for, and their shapes as transformers has them."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (form.vocab_size, form.width)}
    for layer in range(form.num_layers):
        block = {"attn_norm": (form.width,), "ffn_norm": (form.width,), **_attention(form), **_mlp(form)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (form.width,)
    return shapes if form.tied else {**shapes, "output.weight": (form.vocab_size, form.width)}


def _attention(form: Form) -> dict[str, tuple[int, ...]]:
    queries, keys = form.num_heads * form.head_dim, form.num_kv_heads * form.head_dim
    output = {"attn_output": (form.width, queries)}
    if form.architecture == "phi3":
        return {"attn_qkv": (queries + 2 * keys, form.width), **output}
    return {"attn_q": (queries, form.width), "attn_k": (keys, form.width), "attn_v": (keys, form.width), **output}


def _mlp(form: Form) -> dict[str, tuple[int, ...]]:
    up, down = (form.mlp_width, form.width), (form.width, form.mlp_width)
    if form.num_experts:
        n = form.num_experts
        return {
            "ffn_gate_inp": (n, form.width),
            "ffn_gate_exps": (n, *up),
            "ffn_up_exps": (n, *up),
            "ffn_down_exps": (n, *down),
        }
    if form.architecture == "phi3":
        return {"ffn_up": (2 * form.mlp_width, form.width), "ffn_down": down}
    return {"ffn_gate": up, "ffn_up": up, "ffn_down": down}


def _bias_shapes(form: Form) -> Mapping[str, tuple[int, ...]]:
    """Return the biases that llama.cpp reads where a file has them."""
    if form.architecture != "llama":
        return {}
    weights = {**_attention(form), **({} if form.num_experts else _mlp(form))}
    return {f"blk.{i}.{name}.bias": shape[:1] for i in range(form.num_layers) for name, shape in weights.items()}
