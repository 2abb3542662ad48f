"""Write a model with RoPE factors as a GGUF file for llama.cpp.

    theta_j = rope_theta^(-2j/d) / F_j        F is the tensor `rope_freqs.weight`, which divides the plain frequencies

The model is one at one t: its factors F and the context t * L that it serves. Families are those of
`architectures`; llama.cpp's own converter drops the factors without a word, and does not know tokenizers that were
trained here. To keep the tokenizer and quantisation of an existing file, add the factors to it: `patch`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clex_train.config.model import ModelConfig
from clex_train.gguf import files, token_ids
from clex_train.gguf.architectures import Form, form_of
from clex_train.gguf.files import Content, Field, factor_entries, require_factors, require_written
from clex_train.gguf.tensors import WeightType, stored_type, weight_entries
from clex_train.gguf.vocabulary import Vocabulary, read_vocabulary, vocabulary_of
from clex_train.models import architecture
from clex_train.models.tokenizer import load_tokenizer

# llama.cpp treats the vocabulary of a model with one of these names specially, and fails where a token is missing.
SPECIAL_NAMES = re.compile(r"(phi|modern)-?(3|bert)", re.IGNORECASE)


def plan_gguf(
    source: Path,
    factors: Sequence[float],
    served_len: int,
    *,
    weight_type: WeightType | None = None,
    query_scale: float = 1.0,
    attention_factor: float = 1.0,
    name: str | None = None,
) -> Content:
    """Return the GGUF file of a model; its weights are read while it is written, one tensor at a time.

    Args:
        source: Hugging Face directory: config.json, plain weights, a fast tokenizer.
        factors: F_j = plain theta_j of `rope_theta` / theta_j(t), one per pair of rotated dimensions.
        served_len: round(t * L), the context length of the file in tokens.
        weight_type: type of the matrices; by default the one that they are stored in.
        query_scale: factor of the logits of attention, folded into the weights of the queries (constant log-scaling).
        attention_factor: factor of cos and sin that the model has by itself (YaRN).
        name: `general.name`; by default that of the directory.

    Raises:
        ConfigError: a family whose engine ignores factors, weights or a tokenizer that the format cannot express, token
            ids that llama.cpp would compute differently.
    """
    files.gguf_package()  # before seconds of other checks
    model = ModelConfig(path=str(source))
    config = architecture.to_read(model)
    form = form_of(config, served_len)
    require_factors(factors, form.num_rotated // 2)
    tokenizer = load_tokenizer(str(source), model)
    vocabulary = token_ids.choose_pre(vocabulary_of(tokenizer, form.vocab_size), tokenizer)
    token_ids.verify(vocabulary, tokenizer)
    kind = weight_type or stored_type(source)
    entries = [*factor_entries(form.architecture, factors), *weight_entries(source, form, kind, query_scale)]
    fields = [
        Field("general.name", SPECIAL_NAMES.sub(r"\1 \2", name or source.resolve().name)),
        Field("general.file_type", kind.file_type),
        *form.fields(served_len, attention_factor),
        *vocabulary.fields(getattr(tokenizer, "chat_template", None)),
    ]

    def verify(reader: Any) -> None:
        _verify(reader, vocabulary, form, factors)

    return Content(form.architecture, fields, entries, verify)


def _verify(reader: Any, vocabulary: Vocabulary, form: Form, factors: Sequence[float]) -> None:
    """Compare what was read back with what was meant; a difference is an error of this program."""
    # The ids of this vocabulary were compared with those of transformers.
    if read_vocabulary(reader) != vocabulary:
        raise RuntimeError("the vocabulary read back from the file is another one")
    require_written(reader, form.architecture, factors)
