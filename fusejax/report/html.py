"""One self-contained HTML page about a run: no script, no font, no picture from elsewhere.

Everything that comes from a run (names of models and domains, the configuration) is escaped. The pictures are
the SVG files of `plots/`, embedded; the numbers behind them stand beside them as text. What a run has not made yet is
named, and the rest is shown.
"""

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.report.merges import MergeFacts, merges_html
from fusejax.report.metrics import Series, read_series
from fusejax.report.page import contents, details, legend, page, pictures, pre, section, table, write_page
from fusejax.report.plots import curve_of, plot_curves
from fusejax.report.results import results_html, tasks_html
from fusejax.report.sources import alignment_html, choices_html, divergence_html, source_names
from fusejax.report.spans import SpanText, spans_html
from fusejax.report.style import colours_of, source_colours

__all__ = ["build_report"]

# Series of metrics.jsonl -> the title of its panel.
PANELS = {
    "loss": "Loss (nats per token)",
    "clm_nats": "Causal LM loss (nats per token)",
    "fusion_nats": "Fusion loss (nats per supervised token)",
    "z_loss": "Square of the log normaliser (per token)",
    "eval/valid_bits_per_byte": "Held-out text (bits per byte)",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
SMOOTH = frozenset({"learning_rate", "eval/valid_bits_per_byte"})
SPEED = {"tokens_per_second": "Tokens per second", "peak_share": "Share of the devices' peak"}


def build_report(
    run_dir: Path,
    result: Mapping[str, Any],
    *,
    metrics: Mapping[str, Path] | None = None,
    alignment: Mapping[str, Mapping[str, Any]] | None = None,
    spans: Mapping[str, Sequence[SpanText]] | None = None,
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    merges: Mapping[str, MergeFacts] | None = None,
    trained: Mapping[str, Mapping[str, Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
    missing: Sequence[str] = (),
    configuration: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    title: str = "fusejax run",
) -> Path:
    """Writes `report.html` and `plots/*.svg` into a run's directory, made where it is missing.

    Args:
        run_dir: directory of the run.
        result: `result.json`: `bits_per_byte` (model -> domain -> value), optionally `standard_error` of the same
            form, `documents` (quantiles), `tasks`, `seconds`, `peak_rss_bytes`, `export`; empty before the evaluation.
        metrics: training run -> its `metrics.jsonl`.
        alignment: source -> number of positions per outcome, and shares, from `fusejax.alignment.summary`.
        spans: source -> its worst spans.
        choices: fusion -> `positions`, `supervised` ones, and `wins`, those that each source supervises.
        merges: merged model -> what was merged how.
        trained: training run -> facts of the finished model: `compile_seconds`, `peak_bytes`.
        seconds: stage -> seconds it took.
        missing: what the run has not made yet, a sentence each.
        configuration, environment: printed as they are.
        title: heading of the page.

    Returns:
        Path of the page, complete or not there at all; InputError where a metrics file is damaged.
    """
    run_dir = Path(run_dir)
    plots = run_dir / "plots"
    arms = {name: read_series(path) for name, path in (metrics or {}).items()}
    for stale in plots.glob("*.svg"):
        stale.unlink()
    named = (*(alignment or {}), *(name for row in (choices or {}).values() for name in row["wins"]))
    colours = source_colours([*named, *(name for series in arms.values() for name in source_names(series))])
    tables = {
        "Results": results_html(
            result.get("bits_per_byte", {}),
            result.get("standard_error", {}),
            plots,
            documents=result.get("documents", {}),
        ),
        "Tasks": tasks_html(result.get("tasks", {})),
        "Training": _training(arms, plots),
        "Divergence per source": divergence_html(arms, colours, plots),
        "Chosen sources": choices_html(choices or {}, arms, colours, plots),
        "Alignment": alignment_html(alignment or {}) + spans_html(spans or {}),
        "Merge coefficients": merges_html(merges or {}, plots),
        "Throughput": _throughput(arms, trained or {}, seconds or {}, plots),
        "Configuration": details("the resolved configuration", pre(configuration)) if configuration else "",
        "Environment": details("versions, devices, settings", pre(environment)) if environment else "",
    }
    sections = {name: section(name, NOTES.get(name, ""), part) for name, part in tables.items()}
    body = contents(sections) + _missing(missing) + "".join(sections.values())
    return write_page(run_dir / "report.html", page(title, _facts(result), body))


NOTES = {
    "Results": (
        "Bits per byte: negative log-likelihood of the held-out text in bits over its UTF-8 bytes, comparable "
        "between tokenizers; lower is better. The lowest value of each column is marked. ±: one standard error "
        "over documents, where it was estimated; models share the documents, so a difference between two of them "
        "is surer than their errors suggest, and other seeds of a training are not in it. The figures do not start "
        "at zero; their lines are two standard errors to each side."
    ),
    "Tasks": "Share of right answers to the questions of local files, ± its standard error; the highest is marked.",
    "Training": (
        "The loss is the weighted sum that an arm minimises: arms with other weights are compared by their causal"
        " LM loss. Curves of many steps: pale as recorded, dark their centred moving average."
    ),
    "Divergence per source": (
        "Mean divergence of the target from a source's distributions over the positions that this source "
        "supervises, in the logged steps; fifths of the logged steps, weighted by positions."
    ),
    "Chosen sources": (
        "Of all positions of the text, those that each source supervises: MinCE takes the one with the lowest "
        "score in a window of text; where sources are mixed, a position counts for each of them. Curves: shares of "
        "the supervised positions of a logged step, of mixed sources by their weights."
    ),
    "Alignment": (
        "What became of the target's positions: a source prefix ends at the same byte (aligned), inside the token"
        " (conditioned), or nowhere usable (dropped: trained by the causal LM loss alone). Agreement: both true "
        "next tokens have the same symbol; full resolution, of these: it is the target's token itself; mass kept:"
        " probability with a symbol. Worst stretches: the longest without an aligned, agreeing position, marked, "
        "as both tokenizers cut them."
    ),
    "Merge coefficients": (
        "The factor of every target in every matrix. Figures of one merge share a scale from the smallest to the "
        "largest of its coefficients; the column “-” holds what is in no layer."
    ),
    "Throughput": (
        "Tokens that are not padding, per second of a step; compilation, evaluation and saving are not counted."
    ),
}


def _missing(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f'<section class="missing"><h2>Not there yet</h2>\n<ul>{items}</ul></section>\n'


def _facts(result: Mapping[str, Any]) -> str:
    facts = []
    if "seconds" in result:
        facts.append(f"{result['seconds']:.0f} s")
    if "peak_rss_bytes" in result:
        facts.append(f"{result['peak_rss_bytes'] / 2**30:.2f} GiB peak memory")
    if result.get("export"):
        facts.append(f"exported to {result['export']}")
    return html.escape(" · ".join(facts))


def _training(arms: Mapping[str, Series], plots: Path) -> str:
    return _panels(PANELS, arms, plots, stem="training")


def _panels(titles: Mapping[str, str], arms: Mapping[str, Series], plots: Path, *, stem: str) -> str:
    colours = colours_of(list(arms))
    drawn = []
    for name, title in titles.items():
        curves = {arm: curve_of(series, name, colours[arm]) for arm, series in arms.items()}
        path = plots / f"{stem}-{name.rpartition('/')[2]}.svg"
        drawn.append(
            (plot_curves(curves, path, title=title, noisy=name not in SMOOTH), f"{title} over the optimiser step")
        )
    found = pictures(drawn)
    return legend(colours) + found if found else ""


def _throughput(
    arms: Mapping[str, Series], trained: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float], plots: Path
) -> str:
    rows = []
    for arm, series in arms.items():
        steps, rates = series.get("tokens_per_second", ([], []))
        if not rates:
            continue
        facts = trained.get(arm, {})
        compiled, peak = facts.get("compile_seconds"), facts.get("peak_bytes")
        cells = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}", f"{steps[-1]:,.0f}"]
        cells += ["" if compiled is None else f"{compiled:.1f} s", "" if peak is None else f"{peak / 2**20:,.1f} MiB"]
        rows.append((arm, "".join(f"<td>{cell}</td>" for cell in cells)))
    columns = ["arm", "median tokens/s", "lowest", "highest", "last logged step", "compilation", "memory of the step"]
    stages = [(name, f"<td>{took:,.1f}</td>") for name, took in seconds.items()]
    return (
        (table(columns, rows) if rows else "")
        + _panels(SPEED, arms, plots, stem="speed")
        + (table(["stage", "seconds, all calls together"], stages) if stages else "")
    )
