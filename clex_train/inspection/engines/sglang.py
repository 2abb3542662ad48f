"""SGLang 0.5.23, as read in its source (`utils/hf_transformers/common.py`, `layers/rotary_embedding`, `models/`)."""

from collections.abc import Iterator

from clex_train.inspection.engines.verdict import Trap, Verdict, field_traps, longrope_magnitude
from clex_train.inspection.facts import MAX, ORIGINAL, Facts, original_len

VERSION = "0.5.23"
# The first of these that config.json has counts.
LENGTHS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", MAX)
DROPS = ("mixtral", "phi", "gemma", "gemma2", "olmo", "stablelm", "starcoder2", "persimmon", "dbrx", "granitemoe")
"""Model types whose module calls `get_rope` without the scaling."""
NO_MODEL = ("gpt_neox", "falcon")
DEFAULT_LEN = 2048


def verdict(facts: Facts) -> Verdict:
    """Say what SGLang makes of a model."""
    stated = [(name, value) for name in LENGTHS if (value := getattr(facts.config, name, None)) is not None]
    name, length = stated[0] if stated else ("its default", DEFAULT_LEN)
    factor = _factor(facts)
    why = name if factor == 1 else f"factor {factor:g} * {name} {length:,}"
    serves = int(factor * length)
    return Verdict(
        f"SGLang {VERSION}", serves, why, (*field_traps(facts, _field_remedy(facts)), *_traps(facts, factor, serves))
    )


def _factor(facts: Facts) -> float:
    """Return the factor that multiplies the length."""
    # It looks for the factor at the top of rope_parameters, so per-layer types have none.
    every = getattr(facts.config, "rope_parameters", None) or {}
    if ORIGINAL in every or every.get("rope_type") == "llama3":
        return 1.0
    return float(every.get("factor") or 1.0)


def _field_remedy(facts: Facts) -> str:
    if facts.model_type in (*DROPS, *NO_MODEL):
        return "vLLM or transformers: its module of this model type reads no factors"
    return "clex-train export format=huggingface t={t:g}"


def _traps(facts: Facts, factor: float, serves: int) -> Iterator[Trap]:
    if facts.model_type in NO_MODEL:
        yield Trap("no_native_model", f"has no model {facts.model_type} of its own", "vLLM or transformers")
        return
    if facts.model_type in DROPS and facts.is_scaled:
        yield Trap(
            "scaling_dropped",
            f"its {facts.model_type} reads rope_theta alone: the scaling is dropped",
            "vLLM or transformers",
        )
        return
    if factor > 1:
        yield Trap(
            "factor_twice",
            f"serves {factor:g} * {MAX} = {serves:,} tokens, which counts the factor twice if {MAX} is scaled already",
            f"{ORIGINAL} in rope_parameters, or --context-length {facts.max_len}",
        )
    for each in facts.of_type("yarn"):
        # `attn_factor` is the name that it reads.
        if each.get("attention_factor") is not None and each.get("attn_factor") is None:
            yield Trap(
                "attention_factor_ignored",
                f"YaRN's attention_factor {each['attention_factor']:g} is not read: the magnitude comes from factor",
                "vLLM or transformers",
            )
    yield from _longrope(facts)


def _longrope(facts: Facts) -> Iterator[Trap]:
    for each, rope in zip(facts.of_type("longrope"), facts.loaded("longrope"), strict=False):
        original, max_len = original_len(each) or 1, facts.max_len or 1
        if facts.interleaved:
            yield Trap("interleaved_longrope", "refuses longrope where RoPE pairs neighbours", "transformers")
        elif max_len > original:
            magnitude = float(each.get("long_mscale") or longrope_magnitude(max_len, original))
            wrong = abs(magnitude / rope.attention_factor - 1) > 1e-3
            also = f", and cos and sin are multiplied by {magnitude:.4g}" if wrong else ""
            yield Trap(
                "border",
                f"the token at position {original:,} is rotated as position 0{also}",
                f"equal lists and {ORIGINAL} = {MAX} in rope_parameters",
            )
