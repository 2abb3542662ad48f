"""Small model directories in the layout of the original CLEX code, with a tokenizer."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def official_directory(folder: Path, goldens: Path, **facts: object) -> Path:
    """Save the Llama of the goldens with a tokenizer and its config changed by `facts`."""
    folder.mkdir(parents=True)
    shutil.copyfile(goldens / "clex_llama.weights.safetensors", folder / "model.safetensors")
    config = json.loads((goldens / "clex_llama.config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))
    save_tokenizer(folder, config["vocab_size"])
    return folder


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Save a tokenizer with one word per token."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", unk_token="1").save_pretrained(folder)
