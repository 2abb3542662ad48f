"""Turn a GGUF file of a Llama into a Hugging Face directory in float32, dequantised; needs the package `gguf`.

    python -m data_prep.gguf_model SmolLM2-135M-Instruct.Q4_1.gguf runs/demo/model

Weights of 4 bits stay what they are: the result is a model to compare methods on, not one to quote beside published
figures. `make demo` makes its model this way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clex_train.console import program
from clex_train.utils import files, log
from clex_train.utils.errors import require

FORGOTTEN = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
)
"""Keys of the loaded config that describe the GGUF file and not the model."""
DIGITS = {"type": "Digits", "individual_digits": True}


def main() -> None:
    """Convert the file of the command line; refuse another architecture than Llama, and an existing directory."""
    require(len(sys.argv) == 3, "arguments", " ".join(sys.argv[1:]) or None, "a GGUF file and the directory to write")
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    require(source.is_file(), "file", source, "no such file")
    require(not output.exists(), "directory", output, "exists already; name another")
    convert(source, output)
    print(f"written to {output}")


def convert(source: Path, output: Path) -> None:
    """Write the directory with weights, tokenizer and a generation config; complete or not at all."""
    # Imported late, because the checks of `main` should answer at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    require(quantised.config.model_type == "llama", "file", source, f"is a {quantised.config.model_type}, not a llama")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers calls a model that came from GGUF quantised and refuses to save it, so a new one takes its weights.
    settings = {key: value for key, value in quantised.config.to_dict().items() if key not in FORGOTTEN}
    # GGUF stores float32, whose 1e-05 reads 9.999999747378752e-06 here.
    model = LlamaForCausalLM(LlamaConfig(**{**settings, "rms_norm_eps": round(settings["rms_norm_eps"], 12)}))
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.tie_weights()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with files.atomic_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if _pre_tokenizer(source) == "smollm":
            separate_digits(folder / "tokenizer.json")


def separate_digits(file: Path) -> None:
    """Put back the pre-tokenizer of single digits, which transformers leaves out of `smollm` tokenizers."""
    made = json.loads(file.read_text(encoding="utf-8"))
    if made["pre_tokenizer"]["type"] == "ByteLevel":
        made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS, made["pre_tokenizer"]]}
        file.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")


def _pre_tokenizer(source: Path) -> str:
    """Return the GGUF file's name for the regular expression that splits text before the merges."""
    from gguf import GGUFReader

    field: Any = GGUFReader(source).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, lambda: str(__doc__)))
