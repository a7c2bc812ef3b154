"""The results of a run on a page: bits per byte with their errors, and what fusion adds to training on text alone."""

import html
import math
from collections.abc import Mapping
from pathlib import Path

from fusejax.report.page import details, pictures, table
from fusejax.report.plots import plot_dots
from fusejax.report.style import colours_of
from fusejax.report.tables import BitsPerByte, layout

__all__ = ["results_html", "tasks_html"]

QUANTILES = {"p10": "10 %", "median": "median", "p90": "90 %"}
BASELINES = ("clm", "target")  # what models are compared with: the first that is there


def results_html(
    results: BitsPerByte, errors: BitsPerByte, plots: Path, *, documents: Mapping[str, Mapping[str, float]]
) -> str:
    """Returns the table, a figure per domain, and how bits per byte vary between documents.

    Args:
        results: model -> domain (and `mean`) -> bits per byte.
        errors: model -> domain (and `mean`) -> standard error; may lack any of them.
        plots: directory of the figures.
        documents: model -> `count` of documents and quantiles of their bits per byte.
    """
    if not results:
        return ""
    columns, rows = layout(results)
    baseline = next((name for name in BASELINES if "mean" in results.get(name, {})), None)
    head = ["model", *columns, *([f"mean − {baseline}"] if baseline else [])]
    body = []
    for model, cells in rows:
        found = "".join(
            _cell(text, best, errors.get(model, {}).get(column))
            for column, (text, best) in zip(columns, cells, strict=True)
        )
        body.append((model, found + (_difference(results, model, baseline) if baseline else "")))
    whole = table(head, body, label="bits per byte") + _figures(results, errors, columns, plots)
    return whole + details("bits per byte of single documents", _spread(documents))


def tasks_html(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the accuracies (model -> task -> `accuracy`, `stderr`), the highest of each task marked."""
    tasks = list(dict.fromkeys(task for row in results.values() for task in row))
    if not tasks:
        return ""
    best = {task: max(round(row[task]["accuracy"], 3) for row in results.values() if task in row) for task in tasks}
    rows = []
    for model, row in results.items():
        cells = (
            _cell(f"{row[t]['accuracy']:.3f}", round(row[t]["accuracy"], 3) == best[t], row[t]["stderr"])
            if t in row
            else "<td></td>"
            for t in tasks
        )
        rows.append((model, "".join(cells)))
    return table(["model", *tasks], rows, label="tasks")


def _spread(documents: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (model, f"<td>{row['count']:,}</td>" + "".join(f"<td>{row[key]:.3f}</td>" for key in QUANTILES))
        for model, row in documents.items()
        if row.get("count")
    ]
    return table(["model", "documents", *QUANTILES.values()], rows) if rows else ""


def _cell(text: str, best: bool, error: float | None) -> str:
    text = html.escape(text)
    error_text = f" <small>±&nbsp;{error:.3f}</small>" if error is not None and math.isfinite(error) else ""
    return f'<td class="best"><b>{text}</b>{error_text}</td>' if best else f"<td>{text}{error_text}</td>"


def _difference(results: BitsPerByte, model: str, baseline: str) -> str:
    mean, base = results[model].get("mean", math.nan), results[baseline]["mean"]
    if model == baseline or not math.isfinite(mean - base):
        return "<td></td>"
    share = f" <small>({_signed(100 * (mean - base) / base, 2)} %)</small>" if base else ""
    return f"<td>{_signed(mean - base, 4)}{share}</td>"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _figures(results: BitsPerByte, errors: BitsPerByte, columns: list[str], plots: Path) -> str:
    colours = colours_of(list(results))
    drawn = []
    for number, column in enumerate(columns):
        path = plot_dots(
            {model: row[column] for model, row in results.items() if column in row},
            {model: 2 * row[column] for model, row in errors.items() if column in row},
            plots / f"bits_per_byte-{number}.svg",
            title=f"{column} (bits per byte)",
            colours=colours,
        )
        drawn.append((path, f"Bits per byte of every model on {column}; the numbers are in the table"))
    return pictures(drawn)
