"""Context length of an architecture, as its config states it: in one key or another, before or after scaling."""

from typing import Any, NamedTuple

from transformers import PretrainedConfig

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, require

LOCAL_LAYER_TYPES = ("sliding_attention", "chunked_attention")
# These scale every call by the same factor, so a config may state the length before or after scaling.
STATIC = ("linear", "yarn", "llama3")
# MPT and Bloom have no table of positions, and use other names for the length.
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")


class ContextLength(NamedTuple):
    """L in tokens, and its source, for messages."""

    length: int
    source: str


def original_context(config: PretrainedConfig) -> int | None:
    """Return L of an architecture whose context was extended, as its config states it; None if it does not."""
    return stated_length(config, "original_max_position_embeddings")


def context_in_config(config: PretrainedConfig, key: str = "model.context_len") -> ContextLength | None:
    """Read the context length that an architecture serves without us; None if its config does not state one.

    Raises:
        ConfigError: the config may state the length before or after scaling; the remedy names `key`.
    """
    text, original = config.get_text_config(), stated_length(config, "original_max_position_embeddings", key)
    if original is not None:
        return ContextLength(original, "original_max_position_embeddings")
    lengths = ((name, stated_length(config, name, key)) for name in LENGTHS)
    stated = next((ContextLength(length, name) for name, length in lengths if length is not None), None)
    by_layer_type = getattr(text, "rope_parameters", None) or {}
    parameters = _global_parameters(by_layer_type)
    rope_type, own = parameters.get("rope_type"), parameters.get("original_max_position_embeddings")
    if rope_type == "longrope" and own:
        # Its short factors apply up to there; beyond that the model switches by itself.
        return ContextLength(int(own), "original_max_position_embeddings of its longrope")
    # Static scaling may be in `max_position_embeddings` already: DeepSeek multiplies it, Qwen's model cards do not.
    factor = float(parameters.get("factor") or 1)
    if rope_type not in STATIC or stated is None or factor <= 1:
        return stated
    if parameters is not by_layer_type and own is None:
        # Gemma 3, whose local layers are not scaled, states the length that its scaled layers serve.
        return stated
    return _static_context(str(rope_type), factor, own, stated, key)


def stated_length(config: PretrainedConfig, name: str, key: str = "model.context_len") -> int | None:
    """Read a number of tokens; `ConfigError` with the remedy `key` if the value is impossible."""
    value = getattr(config.get_text_config(), name, None)
    if value is None:
        return None
    source = f"{config.name_or_path}/config.json" if config.name_or_path else "config.json"
    if not (isinstance(value, (int, float)) and 2 <= value <= MOST_TOKENS and value == int(value)):
        raise ConfigError(
            source,
            None,
            f"{name}={value}: must be from 2 to {MOST_TOKENS:,} tokens; correct it, or set the context length "
            f"that the model serves by {key}=N",
        )
    return int(value)


def _static_context(rope_type: str, factor: float, own: Any, stated: ContextLength, key: str) -> ContextLength:
    """Return L under static scaling of the original length `own` by `factor`."""
    if rope_type == "llama3":
        # The factor divides the slowest frequencies; it is not the ratio of the lengths.
        served = stated if own and stated.length > own else None
    else:
        served = (
            ContextLength(round(factor * own), f"{rope_type} factor {factor:g} * original {own:,}") if own else None
        )
    require(
        served is not None and stated.length <= served.length,
        key,
        None,
        f"the config scales RoPE by {rope_type} (factor {factor:g}, original {own}) and states {stated.source}="
        f"{stated.length}, which may be the length before or after; set the length that the model serves",
    )
    assert served is not None
    return stated if served.length == stated.length else served


def _global_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the `rope_parameters` of the layers with global attention, if each layer type has its own."""
    nested = {name: each for name, each in parameters.items() if isinstance(each, dict)}
    chosen = [each for name, each in nested.items() if name not in LOCAL_LAYER_TYPES]
    return chosen[0] if chosen else parameters
