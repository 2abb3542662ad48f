"""Stores of conversations in a run: which tokens the loss counts, the chat template, and the token that ends a turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import BadFile, read_regular
from clex_train.utils.protocols import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
"""File of a saved tokenizer, of transformers."""
LARGEST = 2**20
"""Bytes of a template at most."""
COUNTED = {
    "assistant": "the turns of the assistant",
    "last": "the last turn of the assistant",
    "all": "all tokens",
}
"""What the loss counts, by `scored` of `data_prep chat`."""


def use_template(tokenizer: Tokenizer, stores: Mapping[str, TokenStore]) -> None:
    """Give the tokenizer of a run the chat template of its conversations, in place; `final/` then carries it.

    Raises:
        ConfigError: stores have different templates, or one has lost its file.
    """
    found = {name: store for name, store in stores.items() if store.manifest.is_masked}
    if not found:
        return
    templates = {name: _template(store) for name, store in found.items()}
    (first, template), *others = templates.items()
    for name, other in others:
        remedy = f"its chat template is not that of data.domains.{first}; prepare both with one template"
        require(other == template, f"data.domains.{name}.path", found[name].path, remedy)
    tokenizer.chat_template = template


def stop_at_turns(generation_config: Any, stores: Mapping[str, TokenStore]) -> None:
    """Add the tokens that end a turn to the `eos_token_id` of a generation config, in place.

    A base model stops at its own EOS alone; without this, programs that serve it would not stop where it learned to.
    """
    found = (_settings(store).get("stop_id") for store in stores.values())
    ends = {int(token) for token in found if token is not None}
    own = generation_config.eos_token_id
    known = [] if own is None else [own] if isinstance(own, int) else list(own)
    if ends - set(known):
        generation_config.eos_token_id = known + sorted(ends - set(known))


def describe(stores: Mapping[str, TokenStore]) -> Iterator[tuple[str, str]]:
    """Yield (label, text) lines about the tokens that the loss counts, for each store of conversations."""
    for name, store in stores.items():
        if not store.manifest.is_masked:
            continue
        counts = Counter[str]()
        for source in store.manifest.sources:
            counts.update(source.counts)
        tokens = sum(store.manifest.num_tokens(split) for split in store.manifest.splits)
        share = (
            f", {100 * counts['scored_tokens'] / tokens:.3g} % of the store's tokens" if counts["scored_tokens"] else ""
        )
        which = COUNTED.get(str(_settings(store).get("scored")), "the tokens of its mask")
        yield "scored", f"{f'{name}: ' if name else ''}{which}{share}"


def _settings(store: TokenStore) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = store.manifest.settings.get("chat", {})
    return settings


def _template(store: TokenStore) -> str | None:
    # Stores that tests write have no tokenizer.
    if not store.tokenizer_path.is_dir():
        return None
    try:
        return read_regular(store.tokenizer_path / TEMPLATE_FILE, store.path, most=LARGEST).decode()
    except (FileNotFoundError, BadFile, UnicodeDecodeError) as error:
        remedy = f"its tokenizer/{TEMPLATE_FILE} cannot be read; copy the store again, or prepare it again"
        raise ConfigError("data.path", store.path, remedy) from error
