"""What sources did in a run, on a page: how much of the text they reach, where they win, and how far the target is."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.report.metrics import Series
from fusejax.report.page import bar, legend, pictures, table
from fusejax.report.plots import Curve, curve_of, plot_curves

__all__ = ["alignment_html", "choices_html", "divergence_html", "source_names"]

CHAINS = "+chain"  # what trainings call the chains' row
OUTCOMES = {name: f"var(--{name})" for name in ("aligned", "conditioned", "dropped")}
SHARES = {
    "symbol_agreement": "agreement",
    "full_resolution_share": "full resolution",
    "mass_kept": "mass kept",
}


def alignment_html(alignment: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the coverage of every source: positions of the target by outcome, and how good the aligned ones are.

    Args:
        alignment: source -> number of positions per outcome, and the shares of `fusejax.alignment.summary`.
    """
    if not alignment:
        return ""
    kinds = [kind for kind in OUTCOMES if any(row.get(kind) for row in alignment.values())]
    shares = [name for name in SHARES if any(row.get(name) is not None for row in alignment.values())]
    rows = []
    for source, row in alignment.items():
        total = sum(float(row.get(kind) or 0) for kind in OUTCOMES) or 1.0
        parts = {kind: (float(row.get(kind) or 0) / total, OUTCOMES[kind]) for kind in kinds}
        cells = "".join(_count(row.get(kind) or 0, share) for kind, (share, _) in parts.items())
        cells += "".join(f"<td>{_percent(row.get(name))}</td>" for name in shares)
        rows.append((source, cells + f'<td class="wide">{bar(parts)}</td>'))
    columns = ["source", *kinds, *(SHARES[name] for name in shares), "positions of the target"]
    return table(columns, rows, label="alignment") + legend({kind: OUTCOMES[kind] for kind in kinds})


def choices_html(
    choices: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Series], colours: Mapping[str, str], plots: Path
) -> str:
    """Returns which source supervises how many positions, of the whole text and in the steps of the training.

    Args:
        choices: fusion -> `positions`, `supervised` and, per source, `wins`.
        arms: training run -> its series.
        colours: source -> CSS colour.
        plots: directory of the figures.
    """
    names = list(dict.fromkeys(name for row in choices.values() for name in row["wins"]))
    shades = {name: colours[name] for name in names} | {"no distribution": "var(--dropped)"}
    rows = []
    for fusion, row in choices.items():
        counts = dict(row["wins"]) | {"no distribution": row["positions"] - row["supervised"]}
        cells = (
            _count(counts[n], counts[n] / max(row["positions"], 1)) if n in counts else "<td></td>" for n in shades
        )
        whole = max(sum(counts.values()), 1)  # of a mixture more than there are positions
        shown = bar({name: (count / whole, shades[name]) for name, count in counts.items()})
        rows.append((fusion, "".join(cells) + f'<td class="wide">{shown}</td>'))
    drawn = []
    for number, (arm, series) in enumerate(arms.items()):
        curves = {
            name: curve_of(series, f"source_share/{name}", colours[name], scale=100)
            for name in source_names(series)
            if name != CHAINS  # they repeat their sources' weights
        }
        path = plot_curves(curves, plots / f"shares-{number}.svg", title=f"{arm}: supervised by (per cent)")
        drawn.append((path, f"Share of the supervised positions of a step that each source of {arm} supervises"))
    table_html = table(["fusion", *shades, "positions of the target"], rows, label="chosen sources") if rows else ""
    return table_html + (legend(shades) if rows else "") + pictures(drawn)


def divergence_html(arms: Mapping[str, Series], colours: Mapping[str, str], plots: Path) -> str:
    """Returns the mean divergence from every source in the first and the last logged steps, and its curves."""
    rows, drawn, legends = [], [], {}
    for number, (arm, series) in enumerate(arms.items()):
        curves = {name: _supervised(series, name, colours[name]) for name in source_names(series)}
        path = plot_curves(curves, plots / f"divergence-{number}.svg", title=f"{arm}: divergence (nats)")
        drawn.append((path, f"Mean divergence of {arm} from each of its sources over the optimiser step"))
        for name, curve in curves.items():
            if curve is not None:
                rows.append((f"{arm} from {name}", _first_and_last(series, name)))
                legends[name] = colours[name]
    columns = ["divergence (nats)", "first fifth", "last fifth", "change", "positions counted"]
    return (table(columns, rows) if rows else "") + legend(legends) + pictures(drawn)


def source_names(series: Series) -> list[str]:
    """Returns the sources that a training measured, in order."""
    return [name.partition("/")[2] for name in series if name.startswith("source_tokens/")]


def _supervised(series: Series, name: str, colour: str) -> Curve | None:
    """The divergence from a source, at the steps in which it supervises something."""
    counts = dict(zip(*series[f"source_tokens/{name}"], strict=True))
    steps, values = series.get(f"source_nats/{name}", ([], []))
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if counts.get(step)]
    return Curve([step for step, _ in kept], [value for _, value in kept], colour) if kept else None


def _first_and_last(series: Series, name: str) -> str:
    steps, counts = series[f"source_tokens/{name}"]
    nats = dict(zip(*series.get(f"source_nats/{name}", ([], [])), strict=True))
    fifth = max(1, len(steps) // 5)
    first, last = (_mean(steps[part], counts[part], nats) for part in (slice(fifth), slice(-fifth, None)))
    change = "" if first is None or last is None or not first else f"{100 * (last - first) / first:+.1f} %"
    cells = ("" if first is None else f"{first:.4f}", "" if last is None else f"{last:.4f}", change.replace("-", "−"))
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in (*cells, f"{sum(counts):,.0f}"))


def _mean(steps: Sequence[float], counts: Sequence[float], nats: Mapping[float, float]) -> float | None:
    """Mean over positions."""
    known = [(count, nats[step]) for step, count in zip(steps, counts, strict=True) if count and step in nats]
    return sum(count * value for count, value in known) / sum(count for count, _ in known) if known else None


def _count(number: float, share: float) -> str:
    return f"<td>{_percent(share)} <small>{number:,.0f}</small></td>"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
