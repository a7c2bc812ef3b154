"""The pieces of a self-contained HTML page: no script, no font, no picture from elsewhere.

Text is escaped here and nowhere else; a picture is an SVG or PNG file, embedded. Interactive charts are deliberately
absent: a page that needs no script can be mailed, archived and printed. Light or dark is the reader's setting.
"""

import base64
import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.report.style import STYLE

__all__ = [
    "bar",
    "contents",
    "details",
    "legend",
    "page",
    "picture",
    "pictures",
    "pre",
    "section",
    "table",
    "write_page",
]

TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def page(title: str, facts: str, body: str) -> str:
    """Returns a whole page; `facts` and `body` are HTML."""
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<main>\n<h1>{name}</h1>\n<p class="note">{facts}</p>\n{body}</main>\n</body>\n</html>\n'
    )


def section(heading: str, note: str, *parts: str) -> str:
    """Returns a section, or nothing where all its parts are empty."""
    if not any(parts):
        return ""
    note = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f'<section id="{_anchor(heading)}">\n<h2>{html.escape(heading)}</h2>\n{note}{"".join(parts)}</section>\n'


def contents(sections: Mapping[str, str]) -> str:
    """Returns links to the sections, by heading, that are not empty."""
    links = [f'<li><a href="#{_anchor(name)}">{html.escape(name)}</a></li>' for name, part in sections.items() if part]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>\n' if links else ""


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def table(columns: Sequence[str], rows: Sequence[tuple[str, str]], *, label: str = "") -> str:
    """Returns a table; a row is its first cell as text and the other cells as HTML; `label` is read aloud."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>\n' for name, cells in rows)
    aria = f' role="region" aria-label="{html.escape(label or columns[0] or "table")}" tabindex="0"'
    return (
        f'<div class="scroll"{aria}><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
    )


def bar(parts: Mapping[str, tuple[float, str]]) -> str:
    """Returns shares of a whole, part -> (share, CSS colour), as a bar that says them."""
    said = ", ".join(f"{name} {100 * share:.1f} %" for name, (share, _) in parts.items())
    pieces = "".join(
        f'<i style="width:{100 * share:.2f}%;background:{colour}"></i>' for share, colour in parts.values() if share > 0
    )
    return f'<span class="bar" role="img" aria-label="{html.escape(said)}">{pieces}</span>'


def legend(colours: Mapping[str, str]) -> str:
    """Returns names beside their CSS colours."""
    items = (f'<li><i style="background:{colour}"></i>{html.escape(name)}</li>' for name, colour in colours.items())
    return f'<ul class="legend">{"".join(items)}</ul>\n' if colours else ""


def details(summary: str, *parts: str, is_open: bool = False) -> str:
    """Returns parts that are folded under a summary, or nothing where all are empty."""
    if not any(parts):
        return ""
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>\n{''.join(parts)}</details>\n"
    )


def picture(path: Path | None, description: str) -> str:
    """Returns an embedded PNG or SVG file, or nothing for None."""
    if path is None:
        return ""
    data, kind = base64.b64encode(path.read_bytes()).decode("ascii"), TYPES[path.suffix]
    return f'<figure><img alt="{html.escape(description)}" src="data:{kind};base64,{data}"></figure>\n'


def pictures(drawn: Sequence[tuple[Path | None, str]], *, wide: bool = False) -> str:
    """Returns pictures, each a path and a description, as many side by side as there is room for."""
    found = "".join(picture(path, description) for path, description in drawn)
    return f'<div class="panels{" wide" if wide else ""}">\n{found}</div>\n' if found else ""


def pre(value: Mapping[str, Any]) -> str:
    """Returns JSON values as they are."""
    return f'<pre tabindex="0">{html.escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>\n'


def write_page(path: Path, content: str) -> Path:
    """Writes a page, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
    return path
