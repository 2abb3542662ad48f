"""Cut the part of the goldens that is committed in `tests/goldens` out of the complete set.

    python -m tests.helpers.golden_subset FOLDER_OF_THE_COMPLETE_SET

The Llama keeps every layer and, of its vocabulary, the tokens that occur in the texts that are kept. They get new
numbers. No logit depends on the rows of the output layer for other tokens, so the logits of the original code remain
what they were.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SUBSET = Path(__file__).resolve().parents[1] / "goldens"
LENGTHS = (32, 65, 200)
"""Tokens of the texts that are kept; L = 64, so that t is 1, 2 and 4."""
NUM_ROWS = 16
"""Positions of a text whose logits are kept, the first and the last among them."""
WHOLE = ("clex_ode.safetensors", "lmi_attn.safetensors")
BY_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def main(complete: Path, target: Path = SUBSET) -> None:
    """Write the subset into `target`, whose README is written by hand."""
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
    """Return the weights and the logits of the tokens, lengths and positions that are kept."""
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
    """Return the lengths of the texts that a file of logits holds, in tokens."""
    return sorted(int(key.removeprefix("rows.")) for key in logits if key.startswith("rows."))


def evenly(count: int) -> torch.Tensor:
    """Return `NUM_ROWS` indices spread over `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, NUM_ROWS).round().long()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
