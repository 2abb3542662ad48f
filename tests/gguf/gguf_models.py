"""Small random models with trained tokenizers, and a field of factors that forgives nothing.

The factors are between 0.5 and 26 in no order, and the weights of q and k six times their usual size: a wrong order of
pairs, a wrong position or a forgotten factor changes log-probabilities by several nats.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from clex_train.config.scaling import LogScale
from clex_train.gguf import files
from clex_train.gguf.files import Entry, Field
from clex_train.gguf.patch import plan_added_factors
from clex_train.gguf.token_ids import SAMPLES, SPLITS
from clex_train.gguf.writer import plan_gguf
from clex_train.models.directory import write_clex
from clex_train.rope.native import native_handle_on_meta
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, T, VOCAB_SIZE, ROWS = 64, 4.0, 600, 640
"""L in tokens, the scale factor, ids of the tokenizer and rows of the embedding."""
TEXT = [*SAMPLES, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "hatch_build.py").read_text()]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
DIMENSIONS: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5},
    "mistral": {"sliding_window": None, "head_dim": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 0.75},
}
"""Settings of each family that is written, chosen to differ: a base, heads wider than the model, tied, partial."""

# As published in tokenizer.json of Llama 3, Qwen2, Phi-4-mini and Mistral Nemo, spelled without our constants.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "llama-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "gpt-4o": f"{_WORD}{_UPPER}*{_LOWER}+{_END}|{_WORD}{_UPPER}+{_LOWER}*{_END}|\\p{{N}}{{1,3}}|{_REST}",
    "tekken": f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}|{_REST}",
}


def write_gguf(path: Path, source: Path, factors: Sequence[float], served_len: int, **options: Any) -> None:
    """Write the GGUF file of a model directory."""
    files.write(path, plan_gguf(source, factors, served_len, **options))


def add_factors(path: Path, base: Path, factors: Sequence[float], served_len: int, **options: Any) -> None:
    """Write the copy of a GGUF file with factors."""
    files.write(path, plan_added_factors(base, factors, served_len, **options))


def save(
    folder: Path, family: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0, **own: Any
) -> Path:
    """Save a random model of a family with a byte-level tokenizer, and return its folder."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **{**DIMENSIONS, **special, **OWN.get(family, {}), **own})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    make_harsh(model)
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


def save_clex(folder: Path, family: str = "llama", log_scale: LogScale = LogScale.off, **own: Any) -> Path:
    """Save such a model with a field whose factors at t are those of `factors`, as a `final/` of training."""
    save(folder, family, **own)
    handle = native_handle_on_meta(AutoConfig.from_pretrained(folder), CONTEXT)
    base = handle.base_inv_freq
    scaled = base / torch.tensor(factors(len(base)), dtype=torch.float64)
    grid = torch.tensor([1.0, T], dtype=torch.float64)
    table = FrequencyTable(grid, torch.stack([base, scaled]), "clex", CONTEXT, "harsh")
    write_clex(folder, Clex(base, t_max=T), table, CONTEXT, log_scale)
    return folder


@torch.no_grad()
def make_harsh(model: PreTrainedModel) -> None:
    """Make attention sharp, and every parameter matter: biases and norms are random as well."""
    for name, parameter in model.named_parameters():
        if name == "model.norm.weight":
            # A peaked distribution, where errors of log-probabilities show.
            parameter.mul_(8)
        elif parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif "q_proj" in name or "k_proj" in name:
            parameter.mul_(6)
        elif "qkv_proj" in name:
            config = model.config
            head = config.hidden_size // config.num_attention_heads
            parameter[: (config.num_attention_heads + config.num_key_value_heads) * head].mul_(6)


def factors(num_pairs: int) -> list[float]:
    """Return factors from 0.5 to 26, in no order."""
    spread = np.geomspace(0.5, 26.0, num_pairs)
    return list(np.random.default_rng(3).permutation(spread).tolist())


def num_pairs(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head * config["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2


def tokenizer_for(pre: str) -> PreTrainedTokenizerFast:
    """Train the tokenizer that `pre` fits, `pieces` for SentencePiece; the regexes as the models' tokenizer.json."""
    if pre == "pieces":
        return sentence_piece()
    split = SPLITS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split.splits_digits else []
    steps += [pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated")] if pre in PATTERNS else []
    return byte_level(*steps, ignore_merges=split.ignores_merges)


def byte_level(*steps: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with BOS, a chat template and tokens of turns, split by `steps` or as GPT-2's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    is_split = any(isinstance(step, pre_tokenizers.Split) for step in steps)
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|end|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    # Not special: llama.cpp looks for it in any text, and prints it.
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.chat_template = TEMPLATE
    return fast


def sentence_piece() -> PreTrainedTokenizerFast:
    """Train a BPE in the layout of Llama 2: marks for spaces, bytes for unknown characters."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXT[-2:], trainers.BpeTrainer(vocab_size=300))
    learned = json.loads(learner.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*first, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in first[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def quantised(file: Path, folder: Path) -> Path:
    """Write a directory as Q8_0 without factors, as another converter would."""
    import gguf

    plain = file.with_name("plain.gguf")
    write_gguf(plain, folder, [1.0] * num_pairs(folder), CONTEXT)
    reader = files.read(plain)
    fields = [
        Field(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.") and field.name != "general.architecture"
    ]
    kind, entries = gguf.GGMLQuantizationType.Q8_0, []
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name in (files.ROPE_FREQS, *files.LONGROPE):
            continue
        if data.ndim == 2:
            data = gguf.quants.quantize(data, kind)
        own = kind if data.dtype == np.uint8 else tensor.tensor_type
        entries.append(Entry(tensor.name, data.shape, data.dtype, own, lambda data=data: data))
    architecture = files.contents(reader, "general.architecture")
    files.write(file, files.Content(architecture, fields, entries, lambda reader: None))
    return file


def dequantise(folder: Path, file: Path) -> None:
    """Replace the weights of a directory by those of a quantised file of it."""
    import gguf

    stored = load_file(folder / "model.safetensors")
    heads = json.loads((folder / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[heads["model_type"].upper()], heads["num_hidden_layers"])
    found = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in files.read(file).tensors}
    for name, old in stored.items():
        new = found[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        for part, count in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                # Back from neighbouring components to halves.
                new = new.reshape(heads[count], -1, 2, old.shape[-1]).swapaxes(1, 2).reshape(old.shape)
        stored[name] = torch.tensor(np.ascontiguousarray(new))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
