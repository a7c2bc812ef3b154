"""Which bytes of a document are trained: spans of its text, and the turns of a conversation.

A span is a half-open range of UTF-8 bytes of the document's text. Spans are sorted, not empty, do not touch or overlap
and begin and end between characters; what a user gives in characters is turned into bytes when it is read.

A conversation is kept as its contents, joined by an empty line, and its turns: role, start and stop of each content in
that text. The joined text is for people, for hashing and for counting; a model reads the turns as its own chat
template renders them (`fusejax.data.chat`). The spans of a conversation are the contents of its assistant turns. What
else a message holds (`fusejax.data.messages`) is kept with its turn; tool calls also stand in the text, as JSON after
the content, and are part of the span. A model reads them as its template writes them.

Deliberately not done: weights of spans, and spans of user or tool turns in a conversation (a model that answers does
not say them; a text with spans can).
"""

__all__ = ["Turn", "character_spans", "clip_spans", "conversation", "layout_json", "parse_layout"]

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fusejax.data.messages import Message
from fusejax.errors import InputError

Spans = tuple[tuple[int, int], ...]
ASSISTANT = "assistant"
_BETWEEN = "\n\n"


class Turn(NamedTuple):
    """One message: who says bytes [start, stop) of the document's text."""

    role: str
    start: int
    stop: int  # of the content; tool calls follow
    more: str = ""  # JSON: `tool_calls` of an assistant, `name` and `tool_call_id` of a tool

    @property
    def said(self) -> str:
        """What stands in the text for the tool calls."""
        return f"\n{self.more}" if self.more and self.role == ASSISTANT else ""


def conversation(messages: Iterable[Message]) -> tuple[str, tuple[Turn, ...], Spans]:
    """Joins the contents of messages.

    Args:
      messages: in order.

    Returns:
      The text, its turns, and the spans that are trained: assistant contents and tool calls that are not empty.
    """
    parts, turns, at = [], [], 0
    for role, content, *more in messages:
        turn = Turn(role, at, at + len(content.encode()), *more)
        turns.append(turn)
        parts.append(content + turn.said)
        at = turn.stop + len(turn.said.encode()) + len(_BETWEEN)
    return _BETWEEN.join(parts), tuple(turns), _trained(turns)


def _trained(turns: Iterable[Turn]) -> Spans:
    spans = ((turn.start, turn.stop + len(turn.said.encode())) for turn in turns if turn.role == ASSISTANT)
    return tuple((start, stop) for start, stop in spans if stop > start)


def character_spans(text: str, ranges: Any, where: str) -> Spans:
    """Checks ranges of characters and returns them in bytes, touching ones joined.

    Args:
      text: the document.
      ranges: a list of `[start, end]` or `{"start": start, "end": end}`, half-open, in Unicode characters (as Python
        indexes strings), in order.
      where: the record, for messages.

    Raises:
      InputError: something else, a range outside the text or empty, or ranges out of order or overlapping.
    """
    if not isinstance(ranges, list | tuple):
        raise InputError(f"{where}: spans are a {type(ranges).__name__}, expected a list of [start, end] in characters")
    found: list[tuple[int, int]] = []
    for entry in ranges:
        pair: Any = (entry.get("start"), entry.get("end")) if isinstance(entry, dict) else entry
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(edge) is int for edge in pair)):
            raise InputError(f"{where}: span {entry!r}, expected [start, end] or an object with both, in characters")
        start, end = int(pair[0]), int(pair[1])
        if not 0 <= start < end <= len(text):
            raise InputError(f"{where}: span {[start, end]} of a text of {len(text)} characters; need 0 <= start < end")
        if found and start < found[-1][1]:
            raise InputError(
                f"{where}: span {[start, end]} begins before {list(found[-1])} ends; sort and separate them"
            )
        if found and start == found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    if text.isascii():
        return tuple(found)
    edges = sorted({0, *itertools.chain.from_iterable(found)})
    sizes = itertools.accumulate(len(text[a:b].encode()) for a, b in itertools.pairwise(edges))
    at = dict(zip(edges, [0, *sizes], strict=True))
    return tuple((at[start], at[end]) for start, end in found)


def clip_spans(spans: Spans, start: int, stop: int) -> Spans:
    """Returns what lies of spans in bytes [start, stop), counted from `start`."""
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in spans)
    return tuple((a, b) for a, b in cut if a < b)


def layout_json(spans: Spans | None, turns: Sequence[Turn]) -> str:
    """Returns spans and turns as the corpus stores them; empty for a plain document."""
    if turns:
        rows = [list(turn if turn.more else turn[:3]) for turn in turns]
        return json.dumps({"turns": rows}, ensure_ascii=False, separators=(",", ":"))
    return "" if spans is None else json.dumps({"spans": [list(span) for span in spans]}, separators=(",", ":"))


def parse_layout(layout: str) -> tuple[Spans | None, tuple[Turn, ...]]:
    """Reads `layout_json` back."""
    if not layout:
        return None, ()
    found = json.loads(layout)
    turns = tuple(Turn(*turn) for turn in found.get("turns", ()))
    if turns:
        return _trained(turns), turns
    return tuple((a, b) for a, b in found["spans"]), ()
