"""Generate docs/families.md from the checks of every family: `python tests/rope/family_table.py`."""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, PretrainedConfig  # noqa: E402

from clex_train.attention.layer_probe import layer_window, rotary_attention  # noqa: E402
from clex_train.config.attention import AttentionImplementation  # noqa: E402
from clex_train.preflight.document_mask import require_separable  # noqa: E402
from clex_train.rope.patch import RotaryHandle, install_rotary, require_rotary  # noqa: E402
from clex_train.rope.receptive_field import require_scalable_config  # noqa: E402
from tests.rope import family_checks as checks  # noqa: E402
from tests.rope.rotary_families import CONTEXT, FAMILIES, UNEXPORTED, tiny_config, tiny_model  # noqa: E402
from tests.rope.rotary_families import REFUSED as REFUSED_TODAY  # noqa: E402

PAGE = ROOT / "docs" / "families.md"

PUBLISHED = {
    "llama": "Llama 1, 2 and 3, CodeLlama, Vicuna, Yi",
    "gpt_neox": "GPT-NeoX, Pythia",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3": "Qwen3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2 with windows above L",
    "gemma3_text": "Gemma 3",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3 128k, Phi-4-mini",
    "stablelm": "StableLM",
    "falcon": "Falcon (RoPE)",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "cohere": "Command R",
    "granite": "Granite",
    "starcoder2": "StarCoder2 with `sliding_window: null`",
    "olmo3": "OLMo 3",
    "gpt_oss": "gpt-oss",
    "smollm3": "SmolLM3",
    "exaone4": "EXAONE 4 1.2B",
    "ministral3": "Ministral 3",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5",
    "deepseek_v2": "DeepSeek-V2, -V2-Lite",
    "deepseek_v3": "DeepSeek-V3, -R1",
}
SCALED = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
    },
}
REFUSED = ("gpt2", "bloom", "gptj", "codegen", "opt", "mpt", "mamba")

HEAD = """# Families

Look up whether CLEX works with a family of causal language models of transformers. Nothing in the code names a
family: the rotary module is found by its structure and probed (`clex_train/rope/probe.py`), so other families are
likely to work. `python tests/rope/family_table.py` writes this page from small random models, and
`tests/rope/test_rotary_families.py` fails if it is out of date.

"""
COLUMNS = """- rotary / head: dimensions of the small model. They differ if the rotary embedding is partial.
- pairs: `half` pairs component j with j + d/2, `interleaved` 2j with 2j + 1.
- t = 1: logits within L equal those of the unpatched model to 1e-5, with and without a table.
- gradient: the gradient of the loss reaches every frequency.
- crossings: over three changes of t with a KV cache, logits equal those of a cache of unrotated keys to 1e-4 (float32).
- generate: greedy decoding over two changes of t is the same with and without the cache (one layer, where this is
  exact).
- log-scaling: the softmax scale can be set (`clex_train/attention/log_scaling.py`).
- undo: logits and modules are restored to the bit.
- export: `format=huggingface` at t = 4, read by plain transformers, differs from our model by at most 1e-3 in log p at
  L/2, L, L + 1 and 4 L tokens, with a harsh random field.
- documents: `data.document_mask=true` separates the documents of a row in every back end; in all but flash attention
  (`not flash`); or is refused (`no`).

"""
EXPORTS = "A family without an export is refused before weights are read; `final/` of its runs says the same reason."
UNSCALABLE = """These families of today cannot be extended, and are refused before weights are read. All but Mistral 4
train with `scaling=none`. Gemma 4 rotates only a quarter of its pairs."""
LAYERS = """**Which layers are scaled.** Those that attend beyond L: full attention with a RoPE. A layer that sees at
most L tokens, by a window or a chunk, meets no new distance and keeps the model's own frequencies. A layer without RoPE
or with linear attention has nothing to scale.

**Sliding windows.** A layer whose window holds at most L tokens keeps plain positions in training too. Gemma 3 and
OLMo 3 have a RoPE of their own for such layers, so a recipe by formula (`scaling=yarn`) scales the others alone. If one
RoPE serves all layers (Gemma 2, gpt-oss, Qwen2 and Qwen3 with mixed windows), CLEX gives each layer the cos and sin
that it needs. A recipe then follows transformers, which scales every layer by the model's config; a log line says so.
The small Gemma 2 of the table has windows above L. The published ones have windows of at most L, so no config.json
states them at one t ([export](export.md)).

**Layers without positions.** Some families do not rotate in layers with full attention (SmolLM3, EXAONE 4, EXAONE MoE,
Cohere 2, AFMoE). The cached keys of these layers stay unchanged. If every layer that rotates sees a window of at most
L tokens, there is nothing to extend, and scaling is refused with the remedy or the reason: Mistral v0.1, Phi-3 4k,
StarCoder2, EXAONE 4 32B and Cohere 2. Where all layers have windows, the remedy is `sliding_window: null` in
config.json.

**Latent attention** (DeepSeek) caches the rotated part of its keys as values, beside a latent that does not rotate,
and it is rerotated there. A quantized cache is refused once t moves. `format=vllm` is refused, since vLLM reads any
scaling of this attention as YaRN.

**Chunks.** Llama 4 rotates in layers that see one chunk, and scales queries by position in the layers without RoPE.
Ministral 3 multiplies queries by a temperature of the position. Such factors stay the model's own.

**Images.** Qwen3.5 gives positions as time, height and width. Text has three equal ones; others are refused.

**Falcon** computes its softmax scale inside its attention, so log-scaling is refused for it.

"""
SCALINGS = """## Models with a scaling of their own

CLEX starts from the model's own frequencies up to L, theta(1), and its attention factor stays. `dynamic` and `longrope`
change with the length beyond L, where theta(t) takes their place: L is the length up to which they do not change (Phi-3
128k and Phi-4-mini: 4,096), and a larger `model.context_len` is refused. Such a model is also refused if layers with
windows of at most L share the RoPE. `cli.evaluate` and `scaling=none` keep these models as they are
([evaluation](evaluation.md)).

"""
GPTJ = """GPT-J and CodeGen do rotate, but have no module to replace. Every attention layer reads sines from its own
table, indexed by integer positions and as long as the trained context. It has neither fractional positions nor longer
contexts. An adapter would have to replace the attention's forward, which CLEX does not do for any model.
"""


def render() -> str:
    """Render the whole page."""
    families = _family_table() + COLUMNS + _unexported_table()
    return HEAD + families + LAYERS + _unscalable_table() + SCALINGS + _scaling_table() + _refusal_table() + GPTJ


def _family_table() -> str:
    head = ["model_type", "models", "scaled layers", "rotary / head", "pairs", "t = 1", "gradient", "crossings"]
    more = ["generate", "log-scaling", "undo", "export", "documents"]
    return _table([*head, *more], [_family_row(family) for family in FAMILIES])


def _family_row(family: str) -> list[str]:
    handle = checks.handle_of(family)
    config = handle.model.config
    latent = getattr(config, "qk_head_dim", None)
    head = latent or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = (
        checks.error_at_one(family) < checks.AT_ONE,
        checks.num_frequencies_without_gradient(family) == 0,
        checks.error_over_crossings(family) < checks.CROSSINGS,
        checks.generation_agrees(family),
        checks.responds_to_log_scaling(family),
        checks.is_undone(family),
        checks.export_error(family) < checks.EXPORT,
    )
    cells = ["yes" if holds else "no" for holds in found]
    return [
        f"`{family}`",
        PUBLISHED[family],
        _scaled_layers(handle),
        f"{2 * len(handle.base_inv_freq)} / {head}",
        str(handle.layout),
        *cells,
        _documents(config),
    ]


def _scaled_layers(handle: RotaryHandle) -> str:
    """Describe which layers of the small model follow t."""
    modules = rotary_attention(handle.model)
    own = [layer_window(module) for module in modules if not handle.scaled_layers[module.layer_idx]]
    parts = ["windows keep their RoPE"] if any(own) else []
    parts += ["others have none"] if None in own else []
    parts += ["linear attention between"] if len(modules) < handle.model.config.num_hidden_layers else []
    return ", ".join(["full attention", *parts]) if parts else "all"


def _unexported_table() -> str:
    rows = [[f"`{family}`", str(checks.export_refusal(family))] for family in UNEXPORTED]
    return f"{EXPORTS}\n\n" + _table(["model_type", "no export"], rows)


def _unscalable_table() -> str:
    rows = []
    for name, (model_type, settings, _) in REFUSED_TODAY.items():
        config = tiny_config(model_type, settings)
        message = _refusal(lambda config=config: require_scalable_config(config, CONTEXT))
        rows.append([name, f"`{model_type}`", str(message)])
    return f"{UNSCALABLE}\n\n" + _table(["models", "model_type", "message for a small model"], rows)


def _documents(config: PretrainedConfig) -> str:
    if _refusal(lambda: require_separable(config, AttentionImplementation.sdpa)):
        return "no"
    return (
        "not flash" if _refusal(lambda: require_separable(config, AttentionImplementation.flash_attention_2)) else "yes"
    )


def _scaling_table() -> str:
    rows = []
    for name, settings in SCALED.items():
        model = tiny_model("llama", rope_parameters={"rope_type": name, "rope_theta": 1e4, **settings})
        found = [_refusal(lambda model=model, n=n: install_rotary(model, n).undo()) for n in (CONTEXT, 2 * CONTEXT)]
        rows.append([f"`{name}`", *(reason or "theta(1) is the model's own" for reason in found)])
    return _table(
        ["rope_type", f"L = {CONTEXT}, as in config.json", f"L = {2 * CONTEXT}, by `model.context_len`"], rows
    )


def _refusal_table() -> str:
    rows = [
        [f"`{kind}`", str(_refusal(lambda kind=kind: require_rotary(AutoConfig.for_model(kind))))] for kind in REFUSED
    ]
    note = "CLEX needs a RoPE. `cli.evaluate` reads these if they have a KV cache ([evaluation](evaluation.md))."
    return f"## Refused\n\n{note}\n\n" + _table(["model_type", "message"], rows)


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ValueError as refusal:
        return str(refusal)
    return None


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
