"""What a run takes from stores of conversations: the template, the tokens that end a turn, the line that describes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from clex_train.data import conversations
from clex_train.token_store.manifest import MANIFEST
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from clex_train.utils.errors import ConfigError


@pytest.fixture
def chats(tmp_path: Path):
    """Return a function that writes a store of conversations with a template and settings."""

    def make(name: str, template: str | None = "{{ messages }}", **settings: object) -> TokenStore:
        path = tmp_path / name
        write_store(path, {"train": [[1, 2, 3]]}, 10, masks={"train": [[False, True, True, False]]})
        if template is not None:
            (path / "tokenizer").mkdir()
            (path / "tokenizer/chat_template.jinja").write_text(template)
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["settings"] = {"chat": {"scored": "assistant", **settings}}
        source = {"path": "a", "start": 0, "stop": 1, "sha256": None, "counts": {"scored_tokens": 2, "documents": 1}}
        (path / MANIFEST).write_text(json.dumps(manifest | {"sources": [source]}))
        return TokenStore(path)

    return make


def test_the_tokenizer_takes_the_template_of_the_conversations(chats, tmp_path: Path) -> None:
    write_store(tmp_path / "books", {"train": [[1]]}, 10)
    tokenizer = SimpleNamespace(chat_template="its own")
    conversations.use_template(tokenizer, {"book": TokenStore(tmp_path / "books")})
    assert tokenizer.chat_template == "its own"
    conversations.use_template(tokenizer, {"book": TokenStore(tmp_path / "books"), "chat": chats("one")})
    assert tokenizer.chat_template == "{{ messages }}"


def test_stores_of_two_templates_are_refused(chats) -> None:
    with pytest.raises(ConfigError, match=r"data.domains.b.path=.*not that of data.domains.a"):
        conversations.use_template(SimpleNamespace(), {"a": chats("one"), "b": chats("two", "{{ other }}")})


def test_a_lost_template_is_refused(chats) -> None:
    store = chats("one")
    (store.tokenizer_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer/chat_template.jinja cannot be read"):
        conversations.use_template(SimpleNamespace(), {"": store})


@pytest.mark.parametrize(("own", "expected"), [(None, [7]), (2, [2, 7]), ([2, 7], [2, 7]), (7, 7)])
def test_generation_stops_at_the_end_of_a_turn_too(chats, own, expected) -> None:
    generation = SimpleNamespace(eos_token_id=own)
    conversations.stop_at_turns(generation, {"": chats("one", stop_id=7)})
    assert generation.eos_token_id == expected


def test_without_conversations_generation_stops_as_before(chats, tmp_path: Path) -> None:
    write_store(tmp_path / "books", {"train": [[1]]}, 10)
    generation = SimpleNamespace(eos_token_id=2)
    conversations.stop_at_turns(generation, {"": TokenStore(tmp_path / "books")})
    conversations.stop_at_turns(generation, {"": chats("no_stop", stop_id=None)})
    assert generation.eos_token_id == 2


def test_the_opening_lines_say_which_tokens_count(chats) -> None:
    lines = list(conversations.describe({"chat": chats("one")}))
    assert lines == [("scored", "chat: the turns of the assistant, 50 % of the store's tokens")]
