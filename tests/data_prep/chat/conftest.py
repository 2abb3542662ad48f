"""Tokenizers of chat models: a small byte-level BPE with the control tokens of a family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
CONTROL += ["<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_dir: Path) -> Callable[..., Any]:
    """Return a function that loads the tokenizer with every family's control tokens and a template."""

    def load(template: str = CHATML, **options: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, **options)
        tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
        # As in Qwen3: an added token that is not special.
        tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
        tokenizer.chat_template = template
        return tokenizer

    return load
