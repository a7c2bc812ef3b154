"""One self-contained HTML page about a run: no script, no font, no picture from elsewhere.

Everything that comes from a run (names of models and domains, the configuration) is escaped. The pictures are
the PNG files of `plots/`, embedded; the numbers behind them stand beside them as text. Interactive charts are
deliberately absent: a page that needs no script can be mailed, archived and printed.
"""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.report.metrics import read_series
from fusejax.report.page import page, picture, pre, section, table, write_page
from fusejax.report.plots import plot_bits_per_byte, plot_shares, plot_training
from fusejax.report.tables import BitsPerByte, layout

__all__ = ["build_report"]


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
        result: what `quickstart --json` prints: `bits_per_byte` (model -> domain -> value), optionally
            `standard_error`, `documents`, `seconds`, `peak_rss_bytes`, `export`.
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
        section(
            "Bits per byte",
            "Negative log-likelihood of the held-out text in bits, over its UTF-8 bytes: comparable between "
            "tokenizers. Lower is better; the lowest value of each column is bold.",
            _results_table(results) if results else "",
            picture(
                plot_bits_per_byte(results, plots / "bits_per_byte.png", errors=result.get("standard_error")),
                "Bits per byte of every model per domain, with two standard errors each way",
            ),
        ),
        _spread(result),
        _tasks(result),
        section(
            "Training",
            "The loss is the weighted sum that an arm minimises: arms with other weights are compared by their "
            "causal LM loss. Curves of many steps: pale as recorded, dark their centred moving average.",
            picture(plot_training(arms, plots / "training.png"), "Training curves over the optimiser step"),
        ),
        section(
            "Alignment",
            "What became of the target's positions: a source prefix ends at the same byte (aligned), inside the "
            "token (conditioned), or nowhere usable (dropped: trained by the causal LM loss alone).",
            _counts_table(alignment or {}, corner="source"),
            picture(
                plot_shares(alignment or {}, plots / "alignment.png", title="Target positions by outcome"),
                "Share of aligned, conditioned and dropped positions per source",
            ),
        ),
        section(
            "Chosen source",
            "Positions supervised by each source: MinCE takes the one with the lowest score in a window of text.",
            _counts_table(choices or {}, corner="text"),
            picture(
                plot_shares(choices or {}, plots / "choices.png", title="Positions by chosen source"),
                "Share of positions at which each source was chosen",
            ),
        ),
        section("Configuration", "", pre(configuration) if configuration else ""),
        section("Environment", "", pre(environment) if environment else ""),
    ]
    return write_page(run_dir / "report.html", page(title, _facts(result), "".join(sections)))


def _facts(result: Mapping[str, Any]) -> str:
    facts = []
    if "seconds" in result:
        facts.append(f"{result['seconds']:.0f} s")
    if "peak_rss_bytes" in result:
        facts.append(f"{result['peak_rss_bytes'] / 2**30:.2f} GiB peak memory")
    if result.get("export"):
        facts.append(f"exported to {result['export']}")
    return html.escape(" · ".join(facts))


def _results_table(results: BitsPerByte) -> str:
    columns, rows = layout(results)
    body = [
        (model, "".join(f"<td{' class=best' if best else ''}>{html.escape(text)}</td>" for text, best in cells))
        for model, cells in rows
    ]
    return table(["model", *columns], body)


def _spread(result: Mapping[str, Any]) -> str:
    return section(
        "Spread over documents",
        "Standard error of the table above (documents drawn with replacement, the same for all models), and bits per "
        "byte of single documents. It says nothing of trainings with another seed.",
        _errors_table(result.get("standard_error", {})),
        _quantiles_table(result.get("documents", {})),
    )


def _tasks(result: Mapping[str, Any]) -> str:
    results = result.get("tasks", {})
    rows = [
        (model, f'<td class="text">{html.escape(task)}</td><td>{v["accuracy"]:.3f} ± {v["stderr"]:.3f}</td>')
        for model, row in results.items()
        for task, v in row.items()
    ]
    note = "Share of right answers to the questions of local files, with its binomial standard error."
    return section("Tasks", note, table(["model", "task", "accuracy"], rows) if rows else "")


def _errors_table(errors: BitsPerByte) -> str:
    columns, rows = layout(errors, digits=4)
    body = [(model, "".join(f"<td>{html.escape(text)}</td>" for text, _ in cells)) for model, cells in rows]
    return table(["standard error", *columns], body) if columns else ""


def _quantiles_table(quantiles: Mapping[str, Mapping[str, float]]) -> str:
    columns = {"p10": "10 %", "median": "median", "p90": "90 %"}
    rows = [
        (model, f"<td>{row['count']}</td>" + "".join(f"<td>{row[key]:.3f}</td>" for key in columns))
        for model, row in quantiles.items()
        if row.get("count")
    ]
    return table(["documents", "number", *columns.values()], rows) if rows else ""


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
    return table([corner, *columns], body)
