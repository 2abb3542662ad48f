"""Serving an export: overrides and command lines of vLLM, and the families that an engine does not scale.

    vllm serve DIR --hf-overrides "$(cat DIR/t4.json)" --max-model-len N    one set of weights, t chosen at start-up

vLLM replaces `rope_parameters` whole, so an override names its base and its partial rotation too.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from clex_train.export.factors import FixedRope, Source
from clex_train.export.stock_rope import changed_keys
from clex_train.utils.errors import ConfigError, require

SGLANG_DROPS = ("mixtral", "phi", "gemma", "gemma2", "olmo", "stablelm", "starcoder2")
"""Families whose code in SGLang 0.5.23 builds RoPE without the scaling of config.json, and without a word."""
SGLANG_KEEPS = ("llama", "phi3", "mistral", "qwen2", "qwen2_moe", "qwen3", "gemma3_text", "granite", "olmo2")
"""Families whose code in SGLang 0.5.23 passes the scaling on."""


def overrides(base: PretrainedConfig, rope: FixedRope) -> dict[str, Any]:
    """Return the content of `--hf-overrides` that turns the base's config.json into that of one t."""
    changed = changed_keys(base, rope)
    text = base.get_text_config()
    if text is base:
        return changed
    # A model of several parts keeps the keys of its text model in a part of config.json.
    return {next(name for name in base.sub_configs if getattr(base, name) is text): changed}


def override_name(t: float) -> str:
    """Return the file name of the override for `t`."""
    return f"t{t:g}.json"


def write_overrides(folder: Path, base: PretrainedConfig, ropes: Sequence[FixedRope]) -> None:
    """Write an override for every t beside the weights."""
    names = [override_name(rope.t) for rope in ropes]
    same = next((name for name in names if names.count(name) > 1), None)
    require(same is None, "t", ", ".join(str(rope.t) for rope in ropes), f"two of them would be written to {same}")
    for rope in ropes:
        content = json.dumps(overrides(base, rope)) + "\n"
        (folder / override_name(rope.t)).write_text(content, encoding="utf-8")


def require_vllm(rope: FixedRope, base: PretrainedConfig) -> None:
    """Raise `ConfigError` for a family that vLLM cannot serve at one t."""
    require(
        not hasattr(base.get_text_config(), "qk_rope_head_dim"),
        "format",
        "vllm",
        f"model_type={base.model_type}: vLLM reads any scaling of latent attention as YaRN; format=huggingface serves "
        "it in transformers",
    )
    require(
        not rope.interleaved,
        "format",
        "vllm",
        f"model_type={base.model_type}: vLLM's longrope pairs components j and j + d/2, and this family 2j and 2j + 1; "
        "format=huggingface serves it in transformers",
    )


def runs_in(rope: FixedRope, base: PretrainedConfig) -> str:
    """Name what runs a directory at one t, for its model card."""
    try:
        require_vllm(rope, base)
    except ConfigError:
        return "transformers"
    return "transformers or vLLM"


def vllm_command(directory: Path, rope: FixedRope, command: str = "vllm serve") -> str:
    """Return the complete command line that serves a directory at one t."""
    name = shlex.quote(str(directory))
    override = shlex.quote(str(directory / override_name(rope.t)))
    return f'{command} {name} --hf-overrides "$(cat {override})" --max-model-len {rope.served_len}'


def request_lengths(source: Source, ropes: Sequence[FixedRope]) -> list[tuple[int, FixedRope]]:
    """Return the longest request of each t, ascending: the product serves one of n tokens at t_factor * n / L."""
    ascending = sorted(ropes, key=lambda rope: rope.t)
    # t_factor looks ahead, but not beyond t_max, which serves every length up to t_max * L.
    return [
        (rope.served_len if rope.t >= source.t_max else int(rope.served_len / source.t_factor), rope)
        for rope in ascending
    ]


def length_table(source: Source, ropes: Sequence[FixedRope]) -> str:
    """Return the least t by request length as lines of text."""
    rows = [("requests up to", "t", "file")]
    rows += [(f"{n:,} tokens", f"{rope.t:g}", override_name(rope.t)) for n, rope in request_lengths(source, ropes)]
    return "\n".join(f"{length:>18}  {t:>6}  {name}" for length, t, name in rows)


def require_sglang(model_type: str) -> None:
    """Raise `ConfigError` for a family that SGLang would serve with plain RoPE, or not at all."""
    known = ", ".join(SGLANG_KEEPS)
    if model_type in SGLANG_DROPS:
        reason = "SGLang drops the scaling of its config.json in silence and would serve plain RoPE"
        raise ConfigError("format", "sglang", f"model_type={model_type}: {reason}; it keeps it for {known}")
    require(
        model_type in SGLANG_KEEPS,
        "format",
        "sglang",
        f"model_type={model_type}: not known to keep its scaling in SGLang, unlike {known}; use format=vllm",
    )


def sglang_line(model_type: str) -> str:
    """Return a line about SGLang for the console."""
    if model_type in SGLANG_KEEPS:
        return "SGLang reads this directory too"
    if model_type in SGLANG_DROPS:
        return f"do not serve it by SGLang, which drops the scaling of model_type={model_type} in silence"
    return f"SGLang: model_type={model_type} is not known to keep its scaling there"
