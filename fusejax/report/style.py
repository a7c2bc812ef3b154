"""How reports look: the style sheet of pages, and the colours that text, pages and figures share.

Every colour of `ROLES`, `SOURCES` and `FUSIONS` has a contrast of at least 3 to 1 against both backgrounds, so that
one figure serves light and dark; of text it is at least 4.5 to 1.
"""

import zlib
from collections.abc import Iterable, Sequence

__all__ = ["BACKGROUNDS", "FAINT", "INK", "STYLE", "THEME", "colours_of", "source_colours"]

ROLES = {
    "target": "#7d8894",
    "clm": "#3b7cc4",
    "fused": "#d9662b",
    "merged": "#3a8f5f",
    "ensemble": "#8f6cbd",
}
SOURCES = ("#a08a30", "#3f9494", "#c2669a", "#7f8a3f", "#6b7fb8", "#a8714f")
FUSIONS = (
    "#cb5060",
    "#9a6b64",
    "#b87a1e",
    "#4a8290",
    "#7c8f2f",
    "#b06fb0",
)  # further trained and merged targets, by name
INK, FAINT = "#22303c", "#d5dbe1"  # of figures drawn for a white ground
BACKGROUNDS = ("#ffffff", "#18212b")  # of a section, light and dark
THEME = {INK: ("--ink", "#e3e9ee"), FAINT: ("--faint", "#3a4753")}  # colour: its variable in SVG, and in the dark

STYLE = """
:root { color-scheme: light dark; --back: #f4f6f8; --card: #ffffff; --ink: #22303c; --soft: #52606d; --line: #dfe5ea;
  --link: #1f5fa8; --best: #e2f1e7; --mark: #fdeebf; --token: #eef2f5; --aligned: #3f6f9f; --conditioned: #7ba3c9;
  --dropped: #c9d3dc; }
@media (prefers-color-scheme: dark) { :root { --back: #0f151b; --card: #18212b; --ink: #e3e9ee; --soft: #a9b5c0;
  --line: #33404d; --link: #8fc1f5; --best: #1f4330; --mark: #56471a; --token: #253240; --aligned: #6aa0d6;
  --conditioned: #47698a; --dropped: #3a4753; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 16px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 4px; }
p { max-width: 80ch; margin: 8px 0; overflow-wrap: anywhere; }
a { color: var(--link); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 4px 20px 20px;
  margin-top: 20px; }
nav ul, .legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 12px 0 0; }
.legend { margin: 12px 0 4px; }
.legend i { display: inline-block; width: 14px; height: 10px; border-radius: 2px; margin-right: 6px; }
.note { color: var(--soft); }
.missing { border-left: 4px solid #b87a1e; }
.missing ul { margin: 8px 0 0; padding-left: 20px; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 16px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody th { font-weight: 400; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.best b { background: var(--best); border-radius: 4px; padding: 1px 5px; margin-right: -5px; }
td small { color: var(--soft); }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; padding-left: 14px; }
table:has(td.text) th:last-child { text-align: left; padding-left: 14px; }
td.wide { min-width: 180px; width: 40%; }
.bar { display: flex; height: 14px; border-radius: 3px; overflow: hidden; background: var(--line); gap: 1px; }
.bar i { display: block; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 16px; }
.panels.wide { grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr)); }
.panels img { width: 100%; }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
code { overflow-wrap: anywhere; }
figure { margin: 12px 0 0; }
img { max-width: 100%; height: auto; display: block; }
img[src^="data:image/png"] { background: #ffffff; border-radius: 4px; }
pre { background: var(--back); padding: 12px; border-radius: 6px; overflow: auto; max-height: 480px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--link); }
.span { margin: 12px 0 0; padding: 0 0 12px; border-bottom: 1px solid var(--line); }
.span dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 4px 0 0; }
.span dt { color: var(--soft); }
.span dd { margin: 0; }
.tok { background: var(--token); border-radius: 3px; padding: 0 1px; margin-right: 2px; white-space: pre-wrap;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.in { background: var(--mark); font-weight: 600; }
@media (max-width: 560px) { main { padding: 20px 12px 40px; } section { padding: 4px 14px 16px; }
  .span dl { grid-template-columns: 1fr; gap: 0; } td.wide { min-width: 120px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each model: by role or name, so that reports agree, the next free one where taken.

    Sources (`source:NAME`) have theirs by their number.
    """
    found, used = {}, set()
    for number, name in enumerate(names):
        if name.startswith("source:"):
            found[name] = SOURCES[number % len(SOURCES)]
            continue
        first = zlib.crc32(name.encode("utf-8", "surrogatepass"))
        order = [FUSIONS[(first + step) % len(FUSIONS)] for step in range(len(FUSIONS))]
        found[name] = ROLES.get(name) or next((colour for colour in order if colour not in used), order[0])
        used.add(found[name])
    return found


def source_colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each source, by its place among all of a run; the target among them keeps its own."""
    order = [name for name in dict.fromkeys(names) if name != "target"]
    return {"target": ROLES["target"]} | {name: SOURCES[i % len(SOURCES)] for i, name in enumerate(order)}
