"""transformers 5: frequencies are computed from `rope_parameters`; no length is refused."""

from collections.abc import Iterator
from typing import Any

import transformers

from clex_train.inspection.engines.verdict import Trap, Verdict, field_traps
from clex_train.inspection.facts import MAX, ORIGINAL, Facts, lists_differ, original_len

SCALING_KEYS = ("factor", "short_factor", "long_factor", "low_freq_factor", "attention_factor", "beta_fast")
"""Keys that have no effect beside rope_type=default."""
# Microsoft's models were trained with the automatic magnitude.
TRAINED_WITH_MAGNITUDE = ("phi3", "phi4_multimodal", "phimoe", "minicpm", "minicpm3")


def verdict(facts: Facts) -> Verdict:
    """Say what transformers makes of a model."""
    named = f"{MAX} {facts.max_len:,}, beyond which generate() warns" if facts.max_len else "no length in config.json"
    traps = [
        *field_traps(facts, "clex-train export format=huggingface t={t:g}"),
        *_changing(facts),
        *_ignored(facts),
        *_spellings(facts),
        *_magnitude(facts),
    ]
    return Verdict(f"transformers {transformers.__version__}", None, named, tuple(traps))


def _changing(facts: Facts) -> Iterator[Trap]:
    """Yield a trap for frequencies that change while a KV cache is filled."""
    for each in facts.of_type("longrope"):
        if lists_differ(each):
            yield Trap(
                "lists_switch",
                f"the short and long lists differ: frequencies change at token {original_len(each) or 0:,} in the "
                "middle of a generation, and cached keys keep the old ones",
                "equal lists for one length, or prompts that stay on one side",
            )
    if facts.of_type("dynamic"):
        yield Trap(
            "dynamic_cache",
            f"rope_type dynamic changes the frequencies with every token beyond {facts.max_len or 0:,}; cached keys "
            "keep the old ones",
            "rope_type yarn, or longrope with two equal lists of the factors of one length",
        )


def _ignored(facts: Facts) -> Iterator[Trap]:
    for each in facts.of_type("default"):
        # A factor of 1, which some models write, scales nothing.
        keys = [key for key in SCALING_KEYS if each.get(key) not in (None, 1, 1.0)]
        if keys:
            yield Trap(
                "scaling_ignored",
                f"{', '.join(keys)} beside rope_type default: the RoPE is plain",
                "name the rope_type that they belong to, or remove them",
            )


def _spellings(facts: Facts) -> Iterator[Trap]:
    """Yield traps for values that config.json states twice, and differently."""
    old, new = facts.raw.get("rope_scaling"), facts.raw.get("rope_parameters")
    if isinstance(old, dict) and isinstance(new, dict) and _renamed(old).items() - _renamed(new).items():
        yield Trap(
            "two_spellings",
            "rope_scaling and rope_parameters differ: transformers takes rope_scaling, llama.cpp's converter "
            "rope_parameters",
            "remove rope_scaling from config.json",
        )
    outer = facts.raw.get(ORIGINAL)
    inner = original_len(new or old or {})
    if outer and inner and outer != inner and facts.of_type("yarn", "llama3", "longrope"):
        yield Trap(
            "original_twice",
            f"{ORIGINAL} is {outer:,} at the top level, which counts here, and {inner:,} in rope_parameters, which "
            "SGLang and llama.cpp read",
            "write one number, in rope_parameters",
        )


def _renamed(parameters: dict[str, Any]) -> dict[str, str]:
    # Lists are not hashable, and `type` is the older name of `rope_type`.
    return {"rope_type" if key == "type" else key: repr(value) for key, value in parameters.items()}


def _magnitude(facts: Facts) -> Iterator[Trap]:
    for each, rope in zip(facts.of_type("longrope"), facts.loaded("longrope"), strict=False):
        if each.get("attention_factor") is None and rope.attention_factor != 1:
            if facts.model_type in TRAINED_WITH_MAGNITUDE:
                continue
            yield Trap(
                "automatic_magnitude",
                f"longrope without attention_factor: cos and sin are multiplied by {rope.attention_factor:.4g}",
                '"attention_factor": 1.0, unless the model was trained with it',
            )
