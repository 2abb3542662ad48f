"""Read a conversation from a record: `messages`, prompt and completion, or ShareGPT's turns, as a list of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_prep.chat.config import Layout
from data_prep.corpus.bad_record import BadRecord
from data_prep.corpus.readers import CHAT_FIELDS
from data_prep.corpus.utf8 import Utf8, decode

Messages = list[dict[str, str]]
COMPLETION, SYSTEM = "completion", "system"
TOOLS = ("tools", "functions")
"""Fields of a record beside its turns that are read: a system message, and tools, which are refused."""
UNREADABLE = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a turn that would change what is rendered, and are refused instead of dropped."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of speakers in ShareGPT's layout, and their roles."""
ASSISTANT = "assistant"


def read(layout: Layout, value: Any, fields: Mapping[str, Any], name: str) -> Messages:
    """Return the messages of a record; `value` is its field `name`, `fields` are its other ones.

    Raises:
        BadRecord: the record has another layout, a turn is not a text, or no turn is the assistant's.
    """
    if layout is Layout.prompt_completion:
        completion = fields.get(COMPLETION)
        if completion is None:
            raise BadRecord(f"no field {COMPLETION!r} beside {name!r}", "set layout=messages or layout=sharegpt")
        messages = _side(value, "user", name) + _side(completion, ASSISTANT, COMPLETION)
    else:
        messages = _turns(layout, value, name)
    for tools in TOOLS:
        if fields.get(tools):
            raise BadRecord(f"field {tools!r} beside {name!r} describes tools, which are not supported")
    system = _text(fields.get(SYSTEM))
    if isinstance(system, str) and system and messages[0]["role"] != SYSTEM:
        messages = [{"role": SYSTEM, "content": system}, *messages]
    if not any(message["role"] == ASSISTANT for message in messages):
        raise BadRecord(f"field {name!r} has no turn of the assistant, so there is nothing to learn")
    return messages


def to_bytes(messages: Messages) -> bytes:
    """Serialize messages; equal conversations give equal bytes, whatever their layout was."""
    try:
        return json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRecord("a turn has half of a surrogate pair, which is not Unicode") from error


def from_bytes(content: bytes) -> Messages:
    """Return the messages that `to_bytes` serialized."""
    messages: Messages = json.loads(content)
    return messages


def remedy(present: Mapping[str, Any]) -> str:
    """Return the remedy for a record without the expected field."""
    if {"prompt", COMPLETION} <= present.keys():
        return "set layout=prompt_completion"
    found = [name for name in present if name in CHAT_FIELDS]
    return f"set field={found[0]}, and layout=sharegpt for turns of from and value" if found else "set field=NAME"


def _side(value: Any, role: str, name: str) -> Messages:
    value = _text(value)
    return [{"role": role, "content": value}] if isinstance(value, str) else _turns(Layout.messages, value, name)


def _turns(layout: Layout, value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {name!r} must be a list of turns, but is {_kind(value)}", "set field=NAME or layout=")
    return [_turn(layout, turn, number) for number, turn in enumerate(value, start=1)]


def _turn(layout: Layout, turn: Any, number: int) -> dict[str, str]:
    role_key, text_key = ("from", "value") if layout is Layout.sharegpt else ("role", "content")
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        other = Layout.messages if layout is Layout.sharegpt else Layout.sharegpt
        if not isinstance(turn, Mapping):
            raise BadRecord(f"turn {number} is {_kind(turn)} instead of an object with {role_key!r} and {text_key!r}")
        has = ", ".join(map(str, turn))
        raise BadRecord(
            f"turn {number} has no {role_key!r} and {text_key!r} (it has {has})", f"set layout={other.name}"
        )
    for key in UNREADABLE:
        if turn.get(key):
            raise BadRecord(
                f"turn {number} has {key!r}, which is not supported", "write it into the text, or remove it"
            )
    if turn.get("weight") not in (None, 1):
        remedy = "remove the key, or set scored=last"
        raise BadRecord(f"turn {number} has the weight {turn['weight']!r}, which is not supported", remedy)
    role, text = str(_text(turn[role_key])), _text(turn[text_key])
    if not isinstance(text, str):
        raise BadRecord(f"{text_key!r} of turn {number} must be a text, but is {_kind(text)}")
    if role in ("tool", "function", "observation"):
        raise BadRecord(f"turn {number} is that of a tool, which is not supported")
    if layout is Layout.sharegpt and role not in SHAREGPT_ROLES:
        raise BadRecord(f"turn {number} is said by {role!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[role] if layout is Layout.sharegpt else role, "content": text}


def _text(value: Any) -> Any:
    return decode(value.content) if isinstance(value, Utf8) else value


def _kind(value: Any) -> str:
    names = {dict: "an object", str: "a text", Utf8: "a text", type(None): "null"}
    return "empty" if value == [] else names.get(type(value), type(value).__name__)
