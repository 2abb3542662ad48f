"""Tasks of lm-eval on local data, and a model for them whose words are numbers."""

import json
from collections.abc import Iterable
from importlib import util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.evaluation.evaluation_models import VOCAB
from tests.evaluation.model_directories import save_clex_model

needs_harness = pytest.mark.skipif(util.find_spec("lm_eval") is None, reason="needs requirements-eval.txt")

LIKELIHOOD = """
task: next_number
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""
GENERATION = """
task: continued_numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["none"], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def save_number_model(folder: Path) -> None:
    """Save a CLEX model whose tokenizer has one word for each number from 2 up to VOCAB."""
    save_clex_model(folder)
    vocabulary = {"<end>": 0, "<unknown>": 1, **{str(i): i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")
    fast.save_pretrained(folder)


def write_documents(folder: Path, text: str, documents: Iterable[tuple[list[int], list[int]]]) -> None:
    """Write a task file and its documents, which are pairs of a prompt and its answer."""
    folder.mkdir(exist_ok=True)
    rows = [{"text": _words(prompt), "answer": _words(answer)} for prompt, answer in documents]
    data = folder / "documents.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "task.yaml").write_text(text.format(data=data))


def _words(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))
