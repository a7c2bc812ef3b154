"""Conversations from the forms in which records hold them.

| form | record |
|---|---|
| messages | `{"messages": [{"role": "user", "content": "..."}, ...]}` |
| ShareGPT | `{"conversations": [{"from": "human", "value": "..."}, ...]}` |
| question and answer (Alpaca, GSM8K) | `{"instruction": "...", "input": "...", "output": "..."}` by naming the fields |

Contents are trimmed: most templates do that, and a blank that one model sees and another does not is nobody's to learn.
A content is a string, or a list of text parts (the form of the OpenAI interface), which are joined.

A message is (role, content), or (role, content, more): `more` is JSON of what a chat template may want of a tool's
answer (`name`, `tool_call_id`) or of an assistant's turn (`tool_calls`, in the form of the OpenAI interface, with
arguments as an object, as templates expect them).

Deliberately not done: definitions of tools, and images; a record that holds an image is refused.
"""

__all__ = ["Fields", "Message", "calls_of", "messages_of"]

import json
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

Message = tuple[str, ...]  # role, content, and where there is any: JSON of more
_OF_TOOLS = ("name", "tool_call_id")


class Fields(NamedTuple):
    """Where a record holds what."""

    text: str = "text"
    spans: str | None = None  # ranges of characters of the text that are trained
    messages: str | None = None  # a list of messages, in place of the text
    prompt: Sequence[str] = ()  # fields that together are the user's turn, in place of the text
    response: str | None = None  # the field that is the assistant's


def messages_of(fields: Mapping[str, Any], names: Fields, where: str) -> list[Message]:
    """Returns the messages of a record; none where the assistant says and calls nothing.

    Raises:
      InputError: a field is missing or of another kind, a role is not known, or a tool call is no call.
    """
    if names.messages is None:
        said = [_field(fields, name, where) for name in names.prompt]
        prompt = "\n\n".join(part for part in (_content(value, where) for value in said) if part)
        found: list[Message] = [
            ("user", prompt),
            ("assistant", _content(_field(fields, names.response or "", where), where)),
        ]
    else:
        listed = _field(fields, names.messages, where)
        if not isinstance(listed, list | tuple):
            kind = type(listed).__name__
            raise InputError(f"{where}: field {names.messages!r} holds a {kind}, expected a list of messages")
        found = [_message(entry, f"{where}, message {number}") for number, entry in enumerate(listed)]
    says = any(message[0] == "assistant" and (message[1] or calls_of(message)) for message in found)
    return found if says else []


def calls_of(message: Message) -> list[dict[str, Any]]:
    """Returns the tool calls of a message: objects with `function`, which has `name` and `arguments`."""
    return json.loads(message[2]).get("tool_calls", []) if len(message) > 2 else []


def _field(fields: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        known = sorted(map(str, fields))
        raise InputError(f"{where}: no field {name!r}; the fields are {known}.{nearest(name, known)}")
    return fields[name]


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is a {type(entry).__name__}, expected an object with role and content")
    keys = ("role", "content") if "role" in entry else ("from", "value")
    if any(key not in entry for key in keys):
        raise InputError(f"{where} has the keys {sorted(entry)}, expected role and content (or from and value)")
    role = ROLES.get(str(entry[keys[0]]).lower())
    if role is None:
        raise InputError(f"{where}: unknown role {entry[keys[0]]!r}; known: {', '.join(ROLES)}")
    more: dict[str, Any] = {}
    if role == "tool":
        more = {key: entry[key] for key in _OF_TOOLS if isinstance(entry.get(key), str) and key not in keys}
    if calls := entry.get("tool_calls"):
        if role != "assistant":
            raise InputError(f"{where}: a message of role {role!r} calls tools; only the assistant does")
        if not isinstance(calls, list | tuple):
            raise InputError(f"{where}: tool_calls are a {type(calls).__name__}, expected a list")
        more = {"tool_calls": [_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls)]}
    said = _content(entry[keys[1]], where)
    return (role, said, _json(more, where)) if more else (role, said)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as chat templates expect it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InputError(f"{where}: {call!r}, expected {{'function': {{'name': ..., 'arguments': {{...}}}}}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # as the OpenAI interface writes them
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise InputError(f"{where}: arguments {arguments!r} are no JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"{where}: arguments are a {type(arguments).__name__}, expected an object")
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return known | {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _json(value: Mapping[str, Any], where: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: a tool call that cannot be written as JSON: {error}") from error
    return text


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
