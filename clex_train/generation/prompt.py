"""The prompt of a text: read from a file or standard input, and encoded plainly or in a chat template."""

from __future__ import annotations

import sys
from pathlib import Path

from clex_train.retrieval.plan import require_chat_template
from clex_train.retrieval.prompts import encode
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import ConfigError, first_line, require
from clex_train.utils.protocols import Tokenizer

STANDARD_INPUT = "-"
MOST_BYTES = 16 * MOST_TOKENS
"""Bytes of a prompt that are read; a token has about 4."""


def read(file: str) -> str:
    """Return the text of a file, of standard input for `-`; `ConfigError` when it cannot be read or is empty."""
    try:
        # No check for a regular file: `<(command)` of a shell is a pipe, and a fine prompt.
        content = sys.stdin.buffer.read(MOST_BYTES) if file == STANDARD_INPUT else _beginning(Path(file))
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError("prompt_file", file, f"cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise ConfigError("prompt_file", file, f"not UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    require(text.strip() != "", "prompt_file", file, "has no text; write the prompt into it")
    return text


def encoded(tokenizer: Tokenizer, text: str, chat: bool, system: str | None) -> list[int]:
    """Encode a prompt: with the special tokens that the tokenizer begins a text with, or as a user's message.

    Raises `ConfigError` for a tokenizer without a chat template, or a template that refuses the messages.
    """
    if not chat:
        return encode(tokenizer, text)
    require_chat(tokenizer)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise errors of jinja, and through it any others
        key, value = ("chat", True) if system is None else ("system", system)
        reason = f"the chat template refuses it ({first_line(error)}); leave the key out"
        raise ConfigError(key, value, reason) from error
    # The template has written BOS and all other special tokens already.
    return list(tokenizer.encode(written, add_special_tokens=False, verbose=False))


def require_chat(tokenizer: Tokenizer) -> None:
    """Raise `ConfigError` with the remedy for a tokenizer without a chat template."""
    try:
        require_chat_template(tokenizer)
    except ConfigError as error:
        # Evaluations name the same wish `chat_template`.
        raise ConfigError("chat", True, error.remedy) from error


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES)
