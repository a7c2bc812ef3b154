"""Conversations from the forms in which records hold them.

| form | record |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "..."}, ...]}` |
| ShareGPT | `{"conversations": [{"from": "human", "value": "..."}, ...]}` |
| question and answer (Alpaca, GSM8K) | `{"instruction": "...", "input": "...", "output": "..."}` by naming the fields |

Contents are trimmed: most templates do that, and a blank that one model sees and another does not is nobody's to learn.
A content is a string, or a list of text parts (the form of the OpenAI interface), which are joined.

Deliberately not done: tool calls as objects and images; a record that holds one is refused.
"""

__all__ = ["Fields", "messages_of"]

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusejax.errors import InputError, nearest

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class Fields(NamedTuple):
    """Where a record holds what."""

    text: str = "text"
    spans: str | None = None  # ranges of characters of the text that are trained
    messages: str | None = None  # a list of messages, in place of the text
    prompt: Sequence[str] = ()  # fields that together are the user's turn, in place of the text
    response: str | None = None  # the field that is the assistant's


def messages_of(fields: Mapping[str, Any], names: Fields, where: str) -> list[tuple[str, str]]:
    """Returns the (role, content) pairs of a record; none where the assistant says nothing.

    Raises:
      InputError: a field is missing or of another kind, or a role is not known.
    """
    if names.messages is None:
        said = [_field(fields, name, where) for name in names.prompt]
        prompt = "\n\n".join(part for part in (_content(value, where) for value in said) if part)
        found = [("user", prompt), ("assistant", _content(_field(fields, names.response or "", where), where))]
    else:
        listed = _field(fields, names.messages, where)
        if not isinstance(listed, list | tuple):
            kind = type(listed).__name__
            raise InputError(f"{where}: field {names.messages!r} holds a {kind}, expected a list of messages")
        found = [_message(entry, f"{where}, message {number}") for number, entry in enumerate(listed)]
    return found if any(role == "assistant" and content for role, content in found) else []


def _field(fields: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        known = sorted(map(str, fields))
        raise InputError(f"{where}: no field {name!r}; the fields are {known}.{nearest(name, known)}")
    return fields[name]


def _message(entry: Any, where: str) -> tuple[str, str]:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is a {type(entry).__name__}, expected an object with role and content")
    keys = ("role", "content") if "role" in entry else ("from", "value")
    if any(key not in entry for key in keys):
        raise InputError(f"{where} has the keys {sorted(entry)}, expected role and content (or from and value)")
    if entry.get("tool_calls"):
        raise InputError(f"{where} calls tools by objects, which is not supported: write calls and answers as text")
    role = ROLES.get(str(entry[keys[0]]).lower())
    if role is None:
        raise InputError(f"{where}: unknown role {entry[keys[0]]!r}; known: {', '.join(ROLES)}")
    return role, _content(entry[keys[1]], where)


def _content(value: Any, where: str) -> str:
    if isinstance(value, list | tuple):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        if any(not isinstance(part, str) for part in parts):
            raise InputError(f"{where}: a content of parts that are not all text; leave out images and the like")
        value = "".join(map(str, parts))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: a content is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a surrogate pair at character {error.start}; write the whole") from error
    return value.strip()
