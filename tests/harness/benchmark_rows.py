"""Made-up rows in the layouts of the published benchmarks, and a CLEX model that reads them as numbers."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clex_train.models.directory import write_clex
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid

CONTEXT_LEN, VOCAB = 128, 97
T_MAX = 4


def words(generator: random.Random, count: int) -> str:
    return " ".join(str(generator.randint(2, VOCAB - 1)) for _ in range(count))


def longbench_row(name: str, number: int, context_len: int = 110) -> dict[str, Any]:
    """Return a row of LongBench's own files, with numbers for words."""
    generator = random.Random(f"{name}{number}")
    return {
        "input": words(generator, 5),
        "context": words(generator, context_len + number),
        "answers": [words(generator, 12), words(generator, 3)],
        "length": context_len,
        "dataset": name,
        "language": "en",
        "all_classes": [words(generator, 1), words(generator, 1)] if name in ("trec", "lsht") else None,
        "_id": f"{name}-{number}",
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_longbench(folder: Path, names: tuple[str, ...], num_rows: int = 3) -> Path:
    """Write data/<name>.jsonl for each data set."""
    for name in names:
        write_lines(folder / "data" / f"{name}.jsonl", [longbench_row(name, number) for number in range(num_rows)])
    return folder


def build_model() -> LlamaForCausalLM:
    """Build a tiny Llama of L = 128 with weights large enough for every position to matter."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT_LEN, eos_token_id=0, **sizes, **heads)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_base(folder: Path) -> Path:
    """Save the Llama with a tokenizer that has one word for each number, and one for all other words."""
    build_model().save_pretrained(folder)
    vocabulary = {"<end>": 0, "<unknown>": 1, **{str(i): i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # <unknown> is no special token here, so that decoding a prompt keeps it.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def save_clex(folder: Path) -> Path:
    """Save the same model with a vector field that changes the frequencies visibly."""
    save_base(folder)
    inv_freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    clex = Clex(inv_freq, t_max=T_MAX, seed=0)
    torch.nn.init.normal_(clex.down, std=0.5, generator=torch.Generator().manual_seed(1))
    write_clex(folder, clex, clex.table(scale_grid(T_MAX)), CONTEXT_LEN)
    return folder
