"""Generate docs/families.md from the checks of every family: `python tests/rope/family_table.py`."""

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, PretrainedConfig  # noqa: E402

from clex_train.config.attention import AttentionImplementation  # noqa: E402
from clex_train.preflight.document_mask import require_separable  # noqa: E402
from clex_train.rope.patch import install_rotary, require_rotary  # noqa: E402
from tests.rope import family_checks as checks  # noqa: E402
from tests.rope.rotary_families import CONTEXT, FAMILIES, tiny_model  # noqa: E402

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
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "phi3": "Phi-3 (4k)",
    "stablelm": "StableLM",
    "falcon": "Falcon (RoPE)",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "cohere": "Command R",
    "granite": "Granite",
    "starcoder2": "StarCoder2",
}
STATIC = {
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
- documents: `data.document_mask=true` separates the documents of a row in every back end; in all but flash attention
  (`not flash`); or is refused (`no`).

"""
LAYERS = """**Sliding windows.** A layer whose window holds at most L tokens sees no new distance. It keeps the model's
own frequencies, and plain positions in training. Gemma 3 has a separate rotary embedding for such layers. If
one serves all layers (Gemma 2, GPT-OSS, Qwen2 and Qwen3 with mixed windows), each layer gets the cos and sin that it
needs. A recipe by formula (`scaling=yarn`) follows transformers, which scales every layer of these families by the
model's config; a log line says so.

**Layers without positions.** Some families do not rotate in layers with full attention (SmolLM3, EXAONE 4, EXAONE MoE,
Cohere 2, AFMoE). The cached keys of these layers stay unchanged. If every layer that rotates sees a window of at most
L tokens, there is nothing to extend, and scaling is refused with the remedy or the reason: Mistral v0.1, Phi-3 4k,
EXAONE 4 32B and Cohere 2.

**Falcon** computes its softmax scale inside its attention, so log-scaling is refused for it.

"""
SCALINGS = """## Models with a scaling of their own

CLEX starts from a static scaling: theta(1) is the model's own frequencies, and its attention factor stays. A scaling
that changes with the sequence length would conflict with t and is refused in one line. That includes Phi-3 128k models,
which use longrope. `cli.evaluate` reads them unchanged ([evaluation](evaluation.md)).

"""
GPTJ = """GPT-J and CodeGen do rotate, but have no module to replace. Every attention layer reads sines from its own
table, indexed by integer positions and as long as the trained context. It has neither fractional positions nor longer
contexts. An adapter would have to replace the attention's forward, which CLEX does not do for any model.
"""


def render() -> str:
    """Render the whole page."""
    return HEAD + _family_table() + COLUMNS + LAYERS + SCALINGS + _scaling_table() + _refusal_table() + GPTJ


def _family_table() -> str:
    head = ["model_type", "models", "rotary / head", "pairs", "t = 1", "gradient", "crossings", "generate"]
    return _table([*head, "log-scaling", "undo", "documents"], [_family_row(family) for family in FAMILIES])


def _family_row(family: str) -> list[str]:
    handle = checks.handle_of(family)
    config = handle.model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = (
        checks.error_at_one(family) < checks.AT_ONE,
        checks.num_frequencies_without_gradient(family) == 0,
        checks.error_over_crossings(family) < checks.CROSSINGS,
        checks.generation_agrees(family),
        checks.responds_to_log_scaling(family),
        checks.is_undone(family),
    )
    cells = ["yes" if holds else "no" for holds in found]
    return [
        f"`{family}`",
        PUBLISHED[family],
        f"{2 * len(handle.base_inv_freq)} / {head}",
        str(handle.layout),
        *cells,
        _documents(config),
    ]


def _documents(config: PretrainedConfig) -> str:
    if _refusal(lambda: require_separable(config, AttentionImplementation.sdpa)):
        return "no"
    return (
        "not flash" if _refusal(lambda: require_separable(config, AttentionImplementation.flash_attention_2)) else "yes"
    )


def _scaling_table() -> str:
    rows = []
    for name, settings in STATIC.items():
        model = tiny_model("llama", rope_parameters={"rope_type": name, "rope_theta": 1e4, **settings})
        rows.append(
            [f"`{name}`", _refusal(lambda model=model: install_rotary(model, CONTEXT)) or "theta(1) is the model's own"]
        )
    return _table(["rope_type", "CLEX"], rows)


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
