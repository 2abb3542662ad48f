"""vLLM 0.32, as read in its source (`config/model.py`, `model_executor/layers/rotary_embedding`) and measured.

The longest context is derived from config.json: `factor` multiplies `max_position_embeddings` for every rope type but
longrope, llama3 and yarn, whether that number is the length before scaling or after.
"""

from collections.abc import Iterator

from clex_train.inspection.engines.verdict import Trap, Verdict, field_traps, longrope_magnitude
from clex_train.inspection.facts import MAX, ORIGINAL, Facts, lists_differ, original_len

VERSION = "0.32"
LENGTHS = (MAX, "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_seq_length", "seq_len")
UNMULTIPLIED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
KNOWN = ("default", "linear", "dynamic", "ntk", "proportional", "mrope", "mllama4", "xdrope", *UNMULTIPLIED)
BY_TRANSFORMERS = (
    "ArceeForCausalLM",
    "CwmForCausalLM",
    "FlexOlmoForCausalLM",
    "GlmForCausalLM",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "HunYuanDenseV1ForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "Jais2ForCausalLM",
    "MellumForCausalLM",
    "NanbeigeForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "PhiForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
)
"""Architectures that run by transformers' own modeling code inside vLLM, and so with its frequencies and magnitude."""
DEFAULT_LEN = 2048
"""Tokens where config.json states no length."""


def verdict(facts: Facts) -> Verdict:
    """Say what vLLM makes of a model."""
    derived, why = _derived(facts)
    serves, limit = derived, getattr(facts.config, ORIGINAL, None)
    if facts.of_type("longrope") and limit is not None:
        serves, why = int(limit), f"the top-level {ORIGINAL}"
    traps = [
        *field_traps(facts, "clex-train export format=vllm t={t:g}"),
        *_lengths(facts, derived, serves),
        *_numbers(facts, serves),
    ]
    return Verdict(f"vLLM {VERSION}", serves, why, tuple(traps))


def _derived(facts: Facts) -> tuple[int, str]:
    """Return the longest context that vLLM derives, before longrope's default, and its source."""
    stated = {name: getattr(facts.config, name, None) for name in LENGTHS}
    known = {name: value for name, value in stated.items() if value is not None}
    source = min(known, key=lambda name: known[name], default=None)
    length = known[source] if source else float("inf")
    own = getattr(facts.config, "model_max_length", None)
    if own:
        length, source = own, "model_max_length"
    if facts.tokenizer_len is not None and facts.tokenizer_len < length:
        length, source = facts.tokenizer_len, "model_max_length of the tokenizer"
    if source is None:
        length, source = DEFAULT_LEN, "its default without a length in config.json"
    factor = _factor(facts)
    return int(length * factor), source if factor == 1 else f"factor {factor:g} * {source} {int(length):,}"


def _factor(facts: Facts) -> float:
    """Return the factor that multiplies the length; that of the last layer type, as in vLLM."""
    if "gemma3" in facts.model_type:
        return 1.0
    factors = [each["factor"] for each in facts.sets if each.get("rope_type") not in UNMULTIPLIED and "factor" in each]
    return float(factors[-1] or 1.0) if factors else 1.0


def _lengths(facts: Facts, derived: int, serves: int) -> Iterator[Trap]:
    """Yield traps about the length that is served."""
    factor, max_len = _factor(facts), facts.max_len
    originals = [original for each in facts.sets if (original := original_len(each))]
    if factor > 1 and max_len and (not originals or max_len > originals[0]):
        # Without the original length, max_position_embeddings may be the length before scaling or after.
        sure = "counts the factor twice" if originals else f"counts the factor twice if {MAX} is scaled already"
        yield Trap(
            "factor_twice",
            f"serves {factor:g} * {MAX} = {derived:,} tokens, which {sure}",
            f"--max-model-len {max_len}, or longrope with two equal lists of {factor:g}"
            if facts.of_type("linear")
            else f"--max-model-len {max_len}",
        )
    if serves < derived:
        yield Trap(
            "top_level_original",
            f"serves {serves:,} of {derived:,} tokens, since the top level has {ORIGINAL}",
            f"--max-model-len {derived}, or keep the key in rope_parameters only",
        )
    for each in facts.of_type("yarn"):
        reach = round(float(each.get("factor") or 1) * (original_len(each) or 0))
        if max_len and reach > max_len:
            yield Trap(
                "yarn_unreached",
                f"YaRN reaches {reach:,} tokens, but {MAX} is {max_len:,}, and no more is served",
                f'"{MAX}": {reach}',
            )
    if facts.tokenizer_len is not None and max_len and facts.tokenizer_len < max_len:
        yield Trap(
            "tokenizer_limit",
            f"the tokenizer's model_max_length of {facts.tokenizer_len:,} limits the context to less than {max_len:,}",
            f'"model_max_length": {max_len} in tokenizer_config.json',
        )


def _numbers(facts: Facts, serves: int) -> Iterator[Trap]:
    """Yield traps about frequencies and magnitude."""
    if facts.architecture in BY_TRANSFORMERS:
        return
    unknown = [kind for kind in facts.types if kind not in KNOWN]
    if unknown:
        yield Trap("unknown_type", f"refuses rope_type {unknown[0]}", "longrope with two equal lists of the factors")
    if getattr(facts.config, "kv_lora_rank", None):
        # Its model of latent attention writes the type over: `deepseek_yarn` for all but default.
        for kind in set(facts.types) - {"default", "yarn"}:
            yield Trap("latent_yarn", f"reads rope_type {kind} of latent attention as deepseek_yarn", "transformers")
        return
    yield from _longrope(facts, serves)
    if facts.of_type("dynamic"):
        yield Trap(
            "dynamic_is_plain",
            "rope_type dynamic is plain RoPE at every length: the base is computed once, for the unscaled length",
            "rope_type yarn, or longrope with two equal lists of the factors of one length",
        )
    for each in facts.of_type("proportional"):
        if each.get("factor") not in (None, 1, 1.0):
            yield Trap(
                "proportional_factor",
                f"the factor {each['factor']:g} beside rope_type proportional does not reach the frequencies",
                "transformers",
            )


def _longrope(facts: Facts, serves: int) -> Iterator[Trap]:
    for each, rope in zip(facts.of_type("longrope"), facts.loaded("longrope"), strict=False):
        original, max_len = original_len(each) or 1, facts.max_len or 1
        if facts.interleaved:
            yield Trap("interleaved_longrope", "refuses longrope where RoPE pairs neighbours", "transformers")
            return
        stated = each.get("long_mscale" if serves > original else "short_mscale")
        magnitude = longrope_magnitude(max_len, original) if stated is None else float(stated)
        if abs(magnitude / rope.attention_factor - 1) > 1e-3:
            yield Trap(
                "magnitude",
                f"multiplies cos and sin by {magnitude:.4g} instead of {rope.attention_factor:.4g}: it does not read "
                "attention_factor",
                f'"short_mscale": {rope.attention_factor:.6g} and the same long_mscale, or {ORIGINAL} = {MAX}'
                if rope.attention_factor != 1
                else f"{ORIGINAL} = {MAX} = {max_len} in rope_parameters",
            )
        if lists_differ(each):
            chosen = "long" if serves > original else "short"
            yield Trap(
                "one_list",
                f"the {chosen} list counts for every prompt at {serves:,} tokens; above {original:,} it is the long "
                "one, also for short prompts",
                f"--max-model-len {original} for short prompts, a larger one for long prompts",
            )
