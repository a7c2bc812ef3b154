"""Stretches of text that no aligned, agreeing position predicts, with the text around them, as both sides cut it.

White space is made visible: a space is "·", a line break "⏎", a tabulator "⇥". Everything that comes from the text is
escaped.
"""

import html
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fusejax.report.page import details

__all__ = ["VISIBLE", "SpanText", "spans_html"]

CONTEXT, LONGEST, MOST = 40, 160, 5  # bytes around a span, bytes of a span that are shown, spans of a source
VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\0": "␀"})


class SpanText(NamedTuple):
    """A span of a document, and where the tokens of both sides end; numbers are bytes of `text`."""

    document: str
    start: int
    stop: int
    text: bytes  # of the document, what is trained of it
    ends: Mapping[str, Sequence[int]]  # side -> ends of its tokens


def spans_html(spans: Mapping[str, Sequence[SpanText]]) -> str:
    """Returns the first `MOST` spans of every source, folded; a source without any is left out."""
    return "".join(
        details(f"{name}: the {len(found[:MOST])} worst stretches of the text", *(_one(s) for s in found[:MOST]))
        for name, found in spans.items()
    )


def _one(span: SpanText) -> str:
    shown = min(span.stop, span.start + LONGEST)
    cut = "" if shown == span.stop else f", the first {LONGEST} of them shown"
    where = f"{span.document}, bytes {span.start:,} to {span.stop:,}{cut}"
    rows = "".join(
        f"<dt>{html.escape(side)}</dt><dd><code>{_tokens(span, ends, shown)}</code></dd>\n"
        for side, ends in span.ends.items()
    )
    return f'<div class="span"><p class="note">{html.escape(where)}</p>\n<dl>\n{rows}</dl></div>\n'


def _tokens(span: SpanText, ends: Sequence[int], shown: int) -> str:
    """The text from before to after the span, one element per token; a token across an edge of the span is two."""
    first, last = max(0, span.start - CONTEXT), min(len(span.text), shown + CONTEXT)
    edges = sorted({first, span.start, shown, last} | {int(end) for end in ends if first < end < last})
    pieces = []
    for start, stop in itertools.pairwise(edges):
        inside = span.start <= start < shown
        text = span.text[start:stop].decode("utf-8", "replace").translate(VISIBLE)
        pieces.append(f'<span class="tok{" in" if inside else ""}">{html.escape(text)}</span>')
    return "".join(pieces)
