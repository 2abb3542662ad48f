"""Tokenizer of a run or of a model directory."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from clex_train.config.model import ModelConfig
from clex_train.models import directory, hub, official
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def training_tokenizer(model: ModelConfig, arch: PretrainedConfig, store_tokenizer: Path) -> Tokenizer:
    """Load the tokenizer of a run: `model.tokenizer`, else that of the pretrained weights, else the store's.

    For random weights, the vocabulary and special ids of `arch` are set to the tokenizer's, in place.
    """
    path = model.tokenizer or (model.path if model.is_pretrained else None) or str(store_tokenizer)
    tokenizer = load_tokenizer(path, model)
    if not model.is_pretrained:
        arch.vocab_size = len(tokenizer)
        arch.bos_token_id, arch.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        arch.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_tokenizer(path: str, model: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a directory or hub repository. Raises `ConfigError` when there is none."""
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, **hub.options(path)}
    if path == model.path and not Path(path).is_dir():
        options["revision"] = model.revision  # of the model's repository, not of another tokenizer's
    if official.is_official(Path(path)):
        # Otherwise transformers reads config.json itself, and warns about the unknown rope type or family.
        options["config"] = official.read_official_config(Path(path))
    elif (facts := directory.restored_facts(Path(path))) is not None and "auto_map" not in facts:
        options["config"] = AutoConfig.for_model(**facts)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # tokenizers raises bare Exception, transformers many types, for bad files
        raise ConfigError(path, None, _no_tokenizer(path, error)) from error
    return tokenizer


def _no_tokenizer(path: str, error: Exception) -> str:
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return (
            f"no tokenizer in it ({' or '.join(TOKENIZER_FILES)}); copy the tokenizer's files next to the weights, or "
            "name their directory, model.tokenizer=DIR in training"
        )
    return f"no readable tokenizer ({hub.why_not_read(path, error)}); copy its files again"
