"""Extract the committed subset in `tests/goldens` from the complete set of goldens.

    python -m tests.helpers.golden_subset FOLDER_OF_THE_COMPLETE_SET

The Llama keeps every layer and the tokens of its vocabulary that occur in the selected texts, renumbered. No logit
depends on the rows of the output layer for other tokens, so the logits of the original code are unchanged.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SUBSET = Path(__file__).resolve().parents[1] / "goldens"
LENGTHS = (32, 65, 200)
"""Lengths of the selected texts in tokens; L = 64, so that t is 1, 2 and 4."""
NUM_ROWS = 16
"""Number of positions per text whose logits are selected, including the first and the last."""
WHOLE = ("clex_ode.safetensors", "lmi_attn.safetensors")
BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def main(complete: Path, target: Path = SUBSET) -> None:
    """Write the subset to `target`; its README is maintained by hand."""
    target.mkdir(exist_ok=True)
    for name in WHOLE:
        shutil.copyfile(complete / name, target / name)
    weights, logits = cut(
        load_file(complete / "clex_llama.weights.safetensors"), load_file(complete / "clex_eval_tanh.safetensors")
    )
    save_file(weights, target / "clex_llama.weights.safetensors")
    save_file(logits, target / "clex_eval_tanh.safetensors")
    config = json.loads((complete / "clex_llama.config.json").read_text())
    config["vocab_size"] = len(weights["lm_head.weight"])
    (target / "clex_llama.config.json").write_text(json.dumps(config, indent=1) + "\n")


def cut(
    weights: dict[str, torch.Tensor], logits: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Select the weights and logits of the subset: its tokens, lengths and positions."""
    vocabulary, ids = logits["input_ids"][: max(LENGTHS)].unique(return_inverse=True)
    small = {name: x[vocabulary].contiguous() if name in BY_VOCABULARY else x for name, x in weights.items()}
    kept = {"input_ids": ids}
    for length in LENGTHS:
        for key in (f"tanh.log0.{length}.logits", f"tanh.log1.{length}.logits"):
            stored = logits[key]
            positions = torch.arange(length) if len(stored) == length else logits[f"rows.{length}"]
            wanted = logits[f"rows.{length}"][evenly(len(logits[f"rows.{length}"]))]
            kept[f"rows.{length}"] = wanted
            kept[key] = stored[torch.isin(positions, wanted)][:, vocabulary].contiguous()
            kept[f"{key}_last_f64"] = logits[f"{key}_last_f64"][vocabulary].contiguous()
    return small, kept


def stored_lengths(logits: dict[str, torch.Tensor]) -> list[int]:
    """Return the lengths in tokens of the texts in a file of logits."""
    return sorted(int(key.removeprefix("rows.")) for key in logits if key.startswith("rows."))


def evenly(count: int) -> torch.Tensor:
    """Return `NUM_ROWS` evenly spread indices below `count`, including the first and the last."""
    return torch.linspace(0, count - 1, NUM_ROWS).round().long()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
