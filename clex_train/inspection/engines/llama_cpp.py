"""llama.cpp by its converter (`conversion/`, November 2026), as read in the source and measured.

The converter writes linear and YaRN scaling into the metadata. Factors are a tensor, which few of its model classes
write, and which not every architecture of the engine reads.
"""

from collections.abc import Iterator

from clex_train.inspection.engines.verdict import Trap, Verdict, field_traps, longrope_magnitude
from clex_train.inspection.facts import MAX, ORIGINAL, Facts, lists_differ, original_len

READS_FACTORS = (
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "granite",
    "minicpm3",
    "mistral3",
    "ministral3",
    "deepseek",
    "deci",
    "exaone",
    "exaone4",
    "cohere2",
    "apertus",
    "arcee",
    "llama4",
    "llama4_text",
    "nanbeige",
    "gemma4",
    "gemma4_text",
)
"""Model types whose architecture in the engine asks for a tensor of factors."""
AS_LLAMA = ("qwen2",)
"""Model types that can be written as architecture llama."""
WRITES_LISTS = ("phi3", "minicpm", "minicpm3")
WRITES_LLAMA3 = ("llama", "mistral", "mixtral", "arcee", "apertus", "granite", "exaone", "exaone4", "deci", "nanbeige")
WRITES_PROPORTIONAL = ("gemma4", "gemma4_text")
WRITES_DYNAMIC = ("hunyuan_v1_dense", "hunyuan_v1_moe")
UNSCALED = ("cohere", "cohere2")
"""Model types for which the converter writes `rope.scaling.type = none`, whatever config.json says."""
FALCON_LEN = 2048


def verdict(facts: Facts) -> Verdict:
    """Say what llama.cpp makes of a model."""
    serves, why = facts.max_len, f"{MAX} becomes context_length"
    if facts.model_type == "falcon":
        serves, why = FALCON_LEN, "the converter writes this for every Falcon"
    traps = (
        *field_traps(facts, _remedy(facts.model_type, " t={t:g}")),
        *_refused(facts),
        *_dropped(facts),
        *_phi3(facts),
    )
    return Verdict("llama.cpp", serves, why, traps)


def _refused(facts: Facts) -> Iterator[Trap]:
    if facts.model_type == "gpt_neox" and "rotary_pct" not in facts.raw:
        yield Trap(
            "not_converted",
            "the converter fails at a GPT-NeoX that transformers 5 saved (KeyError: 'rotary_pct')",
            '"rotary_pct" at the top level of config.json',
        )
    if facts.model_type == "falcon" and facts.max_len and facts.max_len != FALCON_LEN:
        yield Trap(
            "context_length",
            f"the converter writes a context of {FALCON_LEN:,} tokens instead of {facts.max_len:,}",
            f"-c {facts.max_len}",
        )


def _dropped(facts: Facts) -> Iterator[Trap]:
    """Yield a trap for a scaling that the converter does not write."""
    if not facts.is_scaled:
        return
    for kind in dict.fromkeys(facts.types):
        if kind != "default" and not _is_written(facts.model_type, kind):
            yield Trap(
                "scaling_dropped",
                f"the converter drops rope_type {kind} of {facts.model_type} without an error: the GGUF is plain RoPE",
                _remedy(facts.model_type),
            )


def _is_written(model_type: str, kind: str) -> bool:
    if kind in ("linear", "yarn"):
        return model_type not in UNSCALED
    writers = {
        "longrope": WRITES_LISTS,
        "su": WRITES_LISTS,
        "llama3": WRITES_LLAMA3,
        "proportional": WRITES_PROPORTIONAL,
        "dynamic": WRITES_DYNAMIC,
    }
    return model_type in writers.get(kind, ())


def _remedy(model_type: str, options: str = "") -> str:
    if model_type in (*READS_FACTORS, *AS_LLAMA):
        return f"clex-train export format=gguf{options}, which writes the factors"
    return "vLLM or transformers: this architecture of llama.cpp reads no factors"


def _phi3(facts: Facts) -> Iterator[Trap]:
    if facts.model_type not in WRITES_LISTS:
        return
    for each, rope in zip(facts.of_type("longrope"), facts.loaded("longrope"), strict=False):
        original, max_len = original_len(each) or 1, facts.max_len or 1
        magnitude = longrope_magnitude(max_len, original)
        if facts.model_type == "phi3" and abs(magnitude / rope.attention_factor - 1) > 1e-3:
            yield Trap(
                "magnitude",
                f"the converter writes a magnitude of {magnitude:.4g} instead of {rope.attention_factor:.4g}: it does "
                "not read attention_factor",
                f"{ORIGINAL} = {MAX} in rope_parameters"
                if rope.attention_factor == 1
                else f"set phi3.rope.scaling.attn_factor to {rope.attention_factor:.6g} in the GGUF",
            )
        if lists_differ(each):
            yield Trap(
                "one_list",
                f"one list counts for every prompt: the long one with -c above {original:,}, else the short one",
                f"-c {original} for short prompts, a larger one for long prompts",
            )
