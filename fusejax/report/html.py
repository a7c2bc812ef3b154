"""One self-contained HTML page about a run: no script, no font, no picture from elsewhere.

Everything that comes from a run (names of models and domains, the configuration) is escaped. The pictures are
the PNG files of `plots/`, embedded; the numbers behind them stand beside them as text. Interactive charts are
deliberately absent: a page that needs no script can be mailed, archived and printed.
"""

import base64
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.report.metrics import read_series
from fusejax.report.plots import plot_bits_per_byte, plot_shares, plot_training
from fusejax.report.tables import BitsPerByte, layout

__all__ = ["build_report"]

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
figure { margin: 12px 0 0; }
img { max-width: 100%; height: auto; display: block; }
pre { background: #f4f6f8; padding: 12px; border-radius: 6px; overflow-x: auto; font-size: 13px; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def build_report(
    run_dir: Path,
    result: Mapping[str, Any],
    *,
    metrics: Mapping[str, Path] | None = None,
    alignment: Mapping[str, Mapping[str, float]] | None = None,
    choices: Mapping[str, Mapping[str, float]] | None = None,
    configuration: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    title: str = "fusejax run",
) -> Path:
    """Writes `report.html` and `plots/*.png` into a run's directory.

    Args:
        run_dir: directory of the run; made where it is missing.
        result: what `quickstart --json` prints: `bits_per_byte` (model -> domain -> value), optionally `seconds`,
            `peak_rss_bytes`, `export`.
        metrics: training run -> its `metrics.jsonl`.
        alignment: source -> number of target positions per outcome (`aligned`, `conditioned`, `dropped`).
        choices: domain or set -> number of positions at which each source was chosen (MinCE).
        configuration: the resolved configuration, printed as it is.
        environment: what `fusejax env --json` prints, printed as it is.
        title: heading of the page.

    Returns:
        Path of the page, complete or not there at all.

    Raises:
        InputError: a metrics file is missing or damaged.
    """
    run_dir = Path(run_dir)
    plots = run_dir / "plots"
    results: BitsPerByte = result.get("bits_per_byte", {})
    arms = {name: read_series(path) for name, path in (metrics or {}).items()}
    sections = [
        _section(
            "Bits per byte",
            "Negative log-likelihood of the held-out text in bits, over its UTF-8 bytes: comparable between "
            "tokenizers. Lower is better; the lowest value of each column is bold.",
            _results_table(results) if results else "",
            _picture(
                plot_bits_per_byte(results, plots / "bits_per_byte.png"), "Bits per byte of every model per domain"
            ),
        ),
        _section(
            "Training",
            "The loss is the weighted sum that an arm minimises: arms with other weights are compared by their "
            "causal LM loss. Curves of many steps: pale as recorded, dark their centred moving average.",
            _picture(plot_training(arms, plots / "training.png"), "Training curves over the optimiser step"),
        ),
        _section(
            "Alignment",
            "What became of the target's positions: a source prefix ends at the same byte (aligned), inside the "
            "token (conditioned), or nowhere usable (dropped: trained by the causal LM loss alone).",
            _counts_table(alignment or {}, corner="source"),
            _picture(
                plot_shares(alignment or {}, plots / "alignment.png", title="Target positions by outcome"),
                "Share of aligned, conditioned and dropped positions per source",
            ),
        ),
        _section(
            "Chosen source",
            "Positions supervised by each source: MinCE takes the one with the lowest score in a window of text.",
            _counts_table(choices or {}, corner="text"),
            _picture(
                plot_shares(choices or {}, plots / "choices.png", title="Positions by chosen source"),
                "Share of positions at which each source was chosen",
            ),
        ),
        _section("Configuration", "", _pre(configuration) if configuration else ""),
        _section("Environment", "", _pre(environment) if environment else ""),
    ]
    page = _page(title, _facts(result), "".join(sections))
    path = run_dir / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _page(title: str, facts: str, body: str) -> str:
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<main>\n<h1>{name}</h1>\n<p class="note">{facts}</p>\n{body}</main>\n</body>\n</html>\n'
    )


def _facts(result: Mapping[str, Any]) -> str:
    facts = []
    if "seconds" in result:
        facts.append(f"{result['seconds']:.0f} s")
    if "peak_rss_bytes" in result:
        facts.append(f"{result['peak_rss_bytes'] / 2**30:.2f} GiB peak memory")
    if result.get("export"):
        facts.append(f"exported to {result['export']}")
    return html.escape(" · ".join(facts))


def _section(heading: str, note: str, *parts: str) -> str:
    """Returns a section, or nothing where all its parts are empty."""
    if not any(parts):
        return ""
    note = f'<p class="note">{html.escape(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{note}{''.join(parts)}</section>\n"


def _results_table(results: BitsPerByte) -> str:
    columns, rows = layout(results)
    body = [
        (model, "".join(f"<td{' class=best' if best else ''}>{html.escape(text)}</td>" for text, best in cells))
        for model, cells in rows
    ]
    return _table(["model", *columns], body)


def _counts_table(counts: Mapping[str, Mapping[str, float]], *, corner: str) -> str:
    if not counts:
        return ""
    columns = list(dict.fromkeys(name for row in counts.values() for name in row))
    body = []
    for name, row in counts.items():
        cells = (
            f"{row[column]:,.6g}" if isinstance(row.get(column), float) else f"{row.get(column, 0):,}"
            for column in columns
        )
        body.append((name, "".join(f"<td>{cell}</td>" for cell in cells)))
    return _table([corner, *columns], body)


def _table(columns: list[str], rows: list[tuple[str, str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(f"<tr><td>{html.escape(name)}</td>{cells}</tr>\n" for name, cells in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def _picture(path: Path | None, description: str) -> str:
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></figure>\n'


def _pre(value: Mapping[str, Any]) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>\n"
