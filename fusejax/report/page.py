"""The pieces of a self-contained HTML page: no script, no font, no picture from elsewhere.

Text is escaped here and nowhere else; a picture is a PNG file, embedded. Interactive charts are deliberately
absent: a page that needs no script can be mailed, archived and printed.
"""

import base64
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["page", "picture", "pre", "section", "table", "write_page"]

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f6f8; color: #22303c; font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 8px; }
p { max-width: 75ch; margin: 8px 0; }
section { background: #fff; border: 1px solid #dfe5ea; border-radius: 8px; padding: 4px 20px 20px; margin-top: 20px; }
section h2 { margin-top: 16px; }
.note { color: #5c6b78; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid #e8edf1; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: #5c6b78; font-weight: 600; }
td.best { font-weight: 700; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; padding-left: 14px; }
table:has(td.text) th:last-child { text-align: left; padding-left: 14px; }
code { font-size: 13px; }
figure { margin: 12px 0 0; }
img { max-width: 100%; height: auto; display: block; }
pre { background: #f4f6f8; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


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
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{note}{''.join(parts)}</section>\n"


def table(columns: list[str], rows: list[tuple[str, str]]) -> str:
    """Returns a table; a row is its first cell as text and the other cells as HTML."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(f"<tr><td>{html.escape(name)}</td>{cells}</tr>\n" for name, cells in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def picture(path: Path | None, description: str) -> str:
    """Returns an embedded PNG file, or nothing for None."""
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></figure>\n'


def pre(value: Mapping[str, Any]) -> str:
    """Returns JSON values as they are."""
    return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>\n"


def write_page(path: Path, content: str) -> Path:
    """Writes a page, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
    return path
