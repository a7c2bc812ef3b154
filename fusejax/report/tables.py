"""The table of a run: bits per byte of every model on every domain, lower is better.

One form of the numbers (`layout`) feeds the terminal, Markdown and HTML, so that they cannot disagree. The
lowest value of each column is marked, whichever model it belongs to.
"""

import math
from collections.abc import Mapping

from rich.table import Table

__all__ = ["BitsPerByte", "Cell", "accuracy_table", "layout", "markdown_table", "rich_table"]

BitsPerByte = Mapping[str, Mapping[str, float]]  # model -> domain (and "mean") -> bits per byte
Cell = tuple[str, bool]  # text, whether it is the lowest of its column


def layout(results: BitsPerByte, *, digits: int = 3) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Arranges results for printing.

    Args:
        results: model -> domain -> bits per byte; a model need not have every domain.
        digits: decimals that are printed; equal printed values are marked alike.

    Returns:
        The columns (domains in order of appearance, `mean` last) and the rows: model, cells.
    """
    columns = list(dict.fromkeys(domain for row in results.values() for domain in row if domain != "mean"))
    if any("mean" in row for row in results.values()):
        columns.append("mean")
    lowest = {}
    for column in columns:
        finite = [round(row[column], digits) for row in results.values() if math.isfinite(row.get(column, math.nan))]
        lowest[column] = min(finite, default=math.nan)
    rows = []
    for model, row in results.items():
        cells = []
        for column in columns:
            value = row.get(column)
            text = "" if value is None else f"{value:.{digits}f}"
            cells.append((text, value is not None and round(value, digits) == lowest[column]))
        rows.append((model, cells))
    return columns, rows


def markdown_table(results: BitsPerByte, *, digits: int = 3) -> str:
    """Returns the results as a GitHub Markdown table, the lowest value of each column in bold."""
    columns, rows = layout(results, digits=digits)
    lines = [_line(["bits per byte", *columns]), "|---|" + "---:|" * len(columns)]
    for model, cells in rows:
        lines.append(_line([model, *(f"**{text}**" if best else text for text, best in cells)]))
    return "\n".join(lines) + "\n"


def accuracy_table(results: Mapping[str, Mapping[str, Mapping[str, float]]], *, digits: int = 3) -> str:
    """Returns accuracies (model -> task -> {"accuracy", "stderr", ...}) as a Markdown table; empty without any."""
    tasks = list(dict.fromkeys(task for row in results.values() for task in row))
    if not tasks:
        return ""
    lines = [_line(["accuracy", *tasks]), "|---|" + "---:|" * len(tasks)]
    for model, row in results.items():
        cells = [f"{row[t]['accuracy']:.{digits}f} ± {row[t]['stderr']:.{digits}f}" if t in row else "" for t in tasks]
        lines.append(_line([model, *cells]))
    return "\n".join(lines) + "\n"


def rich_table(results: BitsPerByte, *, digits: int = 3) -> Table:
    """Returns the results as a table for the terminal, the lowest value of each column in bold."""
    columns, rows = layout(results, digits=digits)
    table = Table(title="Bits per byte (lower is better)", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("[", r"\["), justify="right")
    for model, cells in rows:
        texts = [f"[bold]{text}[/bold]" if best else text for text, best in cells]
        table.add_row(model.replace("[", r"\["), *texts)
    return table


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
