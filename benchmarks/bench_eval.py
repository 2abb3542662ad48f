"""Benchmark the memory of an evaluation at one length on a CPU, against its unavoidable minimum.

    python benchmarks/bench_eval.py [--length 65536] [--protocol one_shot] [--output benchmarks/results/NAME.md]

A Llama with random weights and a store with one document are written; a separate process runs
`clex_train.cli.evaluate` on them and reports the peak growth of its resident set after all imports, divided by

    weights + KV cache of the window + one tile of logits + activations of one chunk

in bytes, from shapes alone. Reading the weights is part of the run. Processes other than the measured one do not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20
CHILD = """
import json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from clex_train.utils import log
from clex_train.console import program as console
from clex_train.cli import evaluate as program

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

before = status("VmRSS:")
peak_of_imports = status("VmHWM:")
log.setup()
code = console.run(program.main, program.usage)
peak = status("VmHWM:")
assert code == 0 and peak > peak_of_imports
print(json.dumps({"before": before, "peak": peak}))
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a float32 Llama with untied embeddings; counts are in elements."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 64
    intermediate: int = 688
    vocab: int = 32768

    def weights(self) -> int:
        """Count the elements of all matrices and vectors."""
        # Query and output projections have all heads, key and value projections the key heads.
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.key_heads)
        layer = attention + 3 * self.width * self.intermediate + 2 * self.width
        return 2 * self.vocab * self.width + self.layers * layer + self.width

    def cache(self, length: int) -> int:
        """Count the elements of keys and values for `length` tokens."""
        return 2 * self.layers * length * self.key_heads * self.head_dim

    def activations(self, chunk_len: int) -> int:
        """Count the elements of a layer at its peak: residual, norm, and q, k, v, output or three of the MLP."""
        attention = (2 * self.heads + 2 * self.key_heads) * self.head_dim
        # Attention and MLP run one after the other, so the larger of them counts.
        return chunk_len * (2 * self.width + max(attention, 3 * self.intermediate))


@dataclass(frozen=True)
class Measured:
    """Bytes of one evaluation."""

    parts: dict[str, int]
    grown: int
    before: int

    @property
    def least(self) -> int:
        """Return the sum of the parts."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Return the growth of the resident set relative to the sum of the parts."""
        return self.grown / self.least


def main() -> None:
    """Measure, print one Markdown page, and write it to `--output`."""
    from bench_page import processor, publish

    arguments = parse()
    shape = Shape(layers=arguments.layers)
    # /tmp may be in memory on some machines, hence `--folder`.
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), shape, arguments.length, arguments.chunk_len, arguments.protocol)
    rows = [f"| {name} | {size / MIB:.1f} |" for name, size in found.parts.items()]
    publish(
        [
            f"# Memory of an evaluation of {arguments.length} tokens, {arguments.protocol}",
            "",
            f"`python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}`; one virtual machine, {processor()}.",
            f"{shape}; chunks of {arguments.chunk_len} tokens, float32.",
            "",
            "| part | MiB |",
            "|---|---|",
            *rows,
            f"| sum | {found.least / MIB:.1f} |",
            f"| resident set, most above that after imports ({found.before / MIB:.0f}) | {found.grown / MIB:.1f} |",
            f"| ratio | {found.ratio:.3f} |",
        ],
        arguments.output,
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536, help="tokens of the window")
    parser.add_argument("--chunk_len", type=int, default=1024, help="tokens per forward")
    parser.add_argument("--protocol", default="one_shot", help="one_shot or chunked")
    parser.add_argument("--layers", type=int, default=Shape.layers, help="layers of the model")
    parser.add_argument("--folder", type=Path, help="where to write the model and the store")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def measure(folder: Path, shape: Shape, length: int, chunk_len: int, protocol: str) -> Measured:
    """Evaluate one window of `length` tokens in a subprocess."""
    write_inputs(folder, shape, length)
    words = [f"model={folder / 'model'}", f"data={folder / 'store'}", f"lengths=[{length}]", f"protocols=[{protocol}]"]
    words += [f"chunk_len={chunk_len}", "methods=[ntk]", "precision=fp32", f"output={folder / 'out.json'}"]
    command = [sys.executable, "-c", CHILD, *words]
    # A subprocess: the peak of a resident set cannot be attributed within a process that did other work.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    from clex_train.evaluation.scoring_head import TILE_ELEMENTS

    elements = {
        "weights": shape.weights(),
        "KV cache": shape.cache(length),
        "one tile of logits": TILE_ELEMENTS,
        "activations of one chunk": shape.activations(chunk_len),
    }
    parts = {name: 4 * count for name, count in elements.items()}
    return Measured(parts, found["peak"] - found["before"], found["before"])


def write_inputs(folder: Path, shape: Shape, length: int) -> None:
    """Write the model with its tokenizer, and a store with one document of random tokens."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from clex_train.token_store.writer import write_store

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=min(4096, length // 4),
    )
    model = LlamaForCausalLM(config)
    # The formula above must describe the model that is measured.
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights()
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocab)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="1")
    # One token more than the window, whose last token needs a target.
    document = np.random.default_rng(0).integers(2, shape.vocab, length + 1).tolist()
    write_store(folder / "store", {"train": [document], "validation": [document]}, shape.vocab)
    # Store and model must agree on the tokenizer, or the evaluation refuses them.
    for place in (folder / "model", folder / "store" / "tokenizer"):
        tokenizer.save_pretrained(place)


if __name__ == "__main__":
    main()
