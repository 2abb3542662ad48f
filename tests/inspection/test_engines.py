"""Traps of engines: each appears for a config that has it, and not for one that differs in that point alone.

The lengths are those that vLLM 0.32 and SGLang 0.5.23 computed from the same configs.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from clex_train.inspection.engines.verdict import longrope_magnitude
from tests.inspection.saved_configs import CONTEXT, HARSH, inspect, longrope, save_config, scaled, verdict

FOUR = 4 * CONTEXT
ORIGINAL = "original_max_position_embeddings"
OTHER = [1.0] * len(HARSH)
LINEAR = scaled("linear", factor=4.0, original_max_position_embeddings=CONTEXT)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=CONTEXT)
LLAMA3 = scaled(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=CONTEXT
)
RIGHT = longrope(FOUR, factor=1.0, attention_factor=1.0)
AT_L = longrope(CONTEXT, attention_factor=1.0)
UNEQUAL = longrope(CONTEXT, short_factor=OTHER, attention_factor=1.0, short_mscale=1.0, long_mscale=1.0)
GEMMA4 = {"model_type": "gemma4_text", "head_dim": 16, "global_head_dim": 16, "layer_types": ["full_attention"] * 2}


def parameters(rope: dict[str, Any] | None, max_len: int = FOUR, **facts: Any) -> dict[str, Any]:
    """Return the facts of a config.json."""
    return {"rope_parameters": rope, "max_position_embeddings": max_len, **facts}


class Case(NamedTuple):
    """A trap, a config that has it, and a config that has not."""

    engine: str
    trap: str
    has: dict[str, Any]
    has_not: dict[str, Any]


LATENT = {"model_type": "deepseek_v3", "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16}
PHI3 = {"model_type": "phi3", "pad_token_id": 0, ORIGINAL: CONTEXT}
CASES = [
    Case("transformers", "lists_switch", parameters(UNEQUAL), parameters(AT_L)),
    Case("transformers", "dynamic_cache", parameters(scaled("dynamic", factor=4.0), CONTEXT), parameters(YARN)),
    Case("transformers", "automatic_magnitude", parameters(longrope(CONTEXT)), parameters(AT_L)),
    Case("transformers", "scaling_ignored", parameters(scaled("default", factor=4.0)), parameters(LINEAR)),
    Case(
        "transformers",
        "two_spellings",
        parameters(LINEAR, rope_scaling={**LINEAR, "factor": 2.0}),
        parameters(LINEAR, rope_scaling=LINEAR),
    ),
    Case(
        "transformers",
        "original_twice",
        parameters(YARN, **{ORIGINAL: FOUR}),
        parameters(YARN, **{ORIGINAL: CONTEXT}),
    ),
    Case("vLLM", "factor_twice", parameters(LINEAR), parameters(LINEAR, CONTEXT)),
    Case("vLLM", "factor_twice", parameters(scaled("linear", factor=4.0)), parameters(YARN)),
    Case("vLLM", "top_level_original", parameters(AT_L, **{ORIGINAL: CONTEXT}), parameters(AT_L)),
    Case(
        "vLLM", "top_level_original", parameters(AT_L, **{ORIGINAL: CONTEXT}), parameters(YARN, **{ORIGINAL: CONTEXT})
    ),
    Case("vLLM", "yarn_unreached", parameters(YARN, CONTEXT), parameters(YARN)),
    Case("vLLM", "tokenizer_limit", parameters(YARN, tokenizer_len=CONTEXT), parameters(YARN, tokenizer_len=FOUR)),
    Case("vLLM", "magnitude", parameters(AT_L), parameters({**AT_L, "short_mscale": 1.0, "long_mscale": 1.0})),
    Case("vLLM", "magnitude", parameters(AT_L), parameters(RIGHT)),
    # OLMo runs by transformers' code inside vLLM.
    Case("vLLM", "magnitude", parameters(AT_L), parameters(AT_L, model_type="olmo")),
    Case("vLLM", "one_list", parameters(UNEQUAL), parameters(AT_L)),
    Case(
        "vLLM",
        "dynamic_is_plain",
        parameters(scaled("dynamic", factor=4.0), CONTEXT),
        parameters(scaled("dynamic", factor=4.0), CONTEXT, model_type="olmo"),
    ),
    Case("vLLM", "latent_yarn", parameters(RIGHT, **LATENT), parameters(YARN, **LATENT)),
    Case("vLLM", "latent_yarn", parameters(RIGHT, **LATENT), parameters(RIGHT)),
    Case("vLLM", "interleaved_longrope", parameters(RIGHT, model_type="cohere"), parameters(RIGHT)),
    Case(
        "vLLM",
        "proportional_factor",
        parameters(scaled("proportional", partial_rotary_factor=0.5, factor=4.0)),
        parameters(scaled("proportional", partial_rotary_factor=0.5)),
    ),
    Case("llama.cpp", "scaling_dropped", parameters(RIGHT), parameters(RIGHT, **PHI3)),
    Case("llama.cpp", "scaling_dropped", parameters(LLAMA3, model_type="qwen3"), parameters(LLAMA3)),
    Case("llama.cpp", "scaling_dropped", parameters(scaled("dynamic", factor=4.0), CONTEXT), parameters(YARN)),
    Case("llama.cpp", "scaling_dropped", parameters(YARN, model_type="cohere"), parameters(LINEAR)),
    Case(
        "llama.cpp",
        "scaling_dropped",
        parameters(scaled("proportional", partial_rotary_factor=0.5)),
        parameters(scaled("default")),
    ),
    Case("llama.cpp", "magnitude", parameters(AT_L, **PHI3), parameters(RIGHT, **{**PHI3, ORIGINAL: FOUR})),
    Case("llama.cpp", "one_list", parameters(UNEQUAL, **PHI3), parameters(AT_L, **PHI3)),
    Case(
        "llama.cpp",
        "not_converted",
        parameters(scaled("default"), model_type="gpt_neox"),
        parameters(None, model_type="gpt_neox", rotary_pct=0.25),
    ),
    Case(
        "llama.cpp",
        "context_length",
        parameters(scaled("default"), model_type="falcon"),
        parameters(scaled("default"), 2048, model_type="falcon"),
    ),
    Case("SGLang", "scaling_dropped", parameters(YARN, model_type="mixtral", head_dim=16), parameters(YARN)),
    Case(
        "SGLang",
        "scaling_dropped",
        parameters(YARN, model_type="starcoder2"),
        parameters(scaled("default"), model_type="starcoder2"),
    ),
    Case("SGLang", "border", parameters(AT_L), parameters(RIGHT)),
    Case("SGLang", "factor_twice", parameters(scaled("linear", factor=4.0)), parameters(LINEAR)),
    Case("SGLang", "attention_factor_ignored", parameters({**YARN, "attention_factor": 1.0}), parameters(YARN)),
    Case("SGLang", "interleaved_longrope", parameters(RIGHT, model_type="cohere"), parameters(RIGHT)),
    Case(
        "SGLang",
        "no_native_model",
        parameters(scaled("default"), model_type="gpt_neox"),
        parameters(scaled("default")),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.engine}-{case.trap}")
def test_a_trap_is_named_where_it_is_and_only_there(case: Case, tmp_path: Path) -> None:
    for name, facts, expected in (("has", case.has, True), ("has_not", case.has_not, False)):
        found = verdict(inspect(save_config(tmp_path / name, **facts)), case.engine)
        assert (case.trap in [trap.name for trap in found.traps]) is expected, (name, found)
        assert all("\n" not in trap.text + trap.remedy and trap.remedy for trap in found.traps)


def test_every_trap_is_tested_and_documented() -> None:
    root = Path(__file__).resolve().parents[2]
    source = "".join(path.read_text() for path in (root / "clex_train/inspection/engines").glob("*.py"))
    page = (root / "docs/rope.md").read_text()
    # Those of a CLEX field are in test_spectra.
    elsewhere = {"clex_field_ignored", "clex_field_refused", "unknown_type"}
    for name in {case.trap for case in CASES} | elsewhere:
        assert f'"{name}"' in source
        assert f"`{name}`" in page, name
    assert source.count("Trap(") - source.count("class Trap") <= len({(c.engine, c.trap) for c in CASES}) + len(
        elsewhere
    )


@pytest.mark.parametrize(
    ("facts", "vllm", "sglang"),
    [
        (parameters(scaled("default"), CONTEXT), 256, 256),
        (parameters(LINEAR), 4096, 1024),
        (parameters(scaled("linear", factor=4.0)), 4096, 4096),
        (parameters(scaled("dynamic", factor=4.0), CONTEXT), 1024, 1024),
        (parameters(YARN), 1024, 1024),
        (parameters(YARN, CONTEXT), 256, 256),
        (parameters(LLAMA3), 1024, 1024),
        (parameters(RIGHT), 1024, 1024),
        (parameters(AT_L), 1024, 1024),
        (parameters(AT_L, **{ORIGINAL: CONTEXT}), 256, 1024),
        (parameters(YARN, **{ORIGINAL: CONTEXT}), 1024, 1024),
        (parameters(YARN, tokenizer_len=512), 512, 1024),
        (parameters(scaled("default"), model_max_length=2048), 2048, 2048),
        (parameters(scaled("default", factor=4.0)), 4096, 4096),
    ],
)
def test_lengths_are_those_that_engines_derive(facts: dict[str, Any], vllm: int, sglang: int, tmp_path: Path) -> None:
    found = inspect(save_config(tmp_path, **facts))
    assert (verdict(found, "vLLM").serves, verdict(found, "SGLang").serves) == (vllm, sglang)
    assert verdict(found, "transformers").serves is None
    assert verdict(found, "llama.cpp").serves == facts["max_position_embeddings"]


def test_the_recommended_export_has_one_trap_that_another_format_solves(tmp_path: Path) -> None:
    found = inspect(save_config(tmp_path, **parameters(RIGHT)))
    traps = {each.engine.split()[0]: [trap.name for trap in each.traps] for each in found.verdicts}
    assert traps == {"transformers": [], "vLLM": [], "llama.cpp": ["scaling_dropped"], "SGLang": []}
    (dropped,) = verdict(found, "llama.cpp").traps
    assert "format=gguf" in dropped.remedy


def test_an_architecture_without_factors_is_not_sent_to_gguf(tmp_path: Path) -> None:
    found = inspect(save_config(tmp_path, model_type="qwen3", head_dim=16, **parameters(RIGHT)))
    (dropped,) = verdict(found, "llama.cpp").traps
    assert "reads no factors" in dropped.remedy
    assert "gguf" not in dropped.remedy


def test_gemma3_is_not_multiplied(tmp_path: Path) -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    }
    kinds = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
    assert verdict(inspect(save_config(tmp_path, **kinds, **parameters(rope))), "vLLM").serves == FOUR


def test_magnitude_is_that_of_transformers(tmp_path: Path) -> None:
    (rope,) = inspect(save_config(tmp_path, **parameters(longrope(CONTEXT, factor=4.0)))).ropes
    assert longrope_magnitude(FOUR, CONTEXT) == pytest.approx(rope.attention_factor, abs=1e-12)
    assert longrope_magnitude(CONTEXT, CONTEXT) == 1
