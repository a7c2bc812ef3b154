"""The figures of a report, as PNG files drawn by matplotlib's Agg: no display, no browser, no global state.

Every axis says its unit, every bar its value. Series that a run did not record are left out, an empty figure
is not written. Colours follow the role of a model, not its rank, so that two reports can be compared.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusejax.report.metrics import Series, smooth
from fusejax.report.tables import BitsPerByte, layout

__all__ = ["grid", "plot_alignment", "plot_bits_per_byte", "plot_shares", "plot_training", "save"]

ROLES = {
    "target": "#9aa5b1",
    "clm": "#2f6fb5",
    "fused": "#d9662b",
    "merged": "#3a8f5f",
    "ensemble": "#7d5ba6",
}
SOURCES = ("#b8a04a", "#5aa7a7", "#b5658b", "#7a7f45", "#6b7fb8", "#a06b4a")
FUSIONS = ("#b23a48", "#8c5e58", "#e09f3e", "#335c67")  # further trained targets, by name
OUTCOMES = {"aligned": "#46637f", "conditioned": "#86a0b8", "dropped": "#cdd7e0", "no distribution": "#cdd7e0"}
PALE = frozenset({"dropped", "no distribution"})
INK, FAINT = "#22303c", "#d5dbe1"

# Series of metrics.jsonl -> the title of its panel.
PANELS = {
    "loss": "Loss (nats per token)",
    "clm_nats": "Causal LM loss (nats per token)",
    "fusion_nats": "Fusion loss (nats per supervised token)",
    "eval/valid_bits_per_byte": "Held-out text (bits per byte)",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Throughput (tokens per second)",
}
NOISY = frozenset(PANELS) - {"learning_rate", "eval/valid_bits_per_byte"}


def plot_training(arms: Mapping[str, Series], path: Path) -> Path | None:
    """Draws the training curves of several arms over the optimiser step, one panel per quantity.

    Args:
        arms: name of the training run -> its series, from `read_series`.
        path: PNG file to write.

    Returns:
        `path`, or None where no arm recorded any of the known quantities.
    """
    panels = [name for name in PANELS if any(any(series.get(name, ([], []))[1]) for series in arms.values())]
    if not panels:
        return None
    columns = _columns(len(panels))
    figure, axes = grid(len(panels), columns=columns, width=4.2, height=3.0)
    for name, ax in zip(panels, axes, strict=True):
        for number, (arm, series) in enumerate(arms.items()):
            steps, values = series.get(name, ([], []))
            if not any(values):  # not recorded, or a term this arm does not have
                continue
            colour = colour_of(arm, number)
            noisy = name in NOISY and len(values) > 20
            ax.plot(steps, values, color=colour, alpha=0.22 if noisy else 1, linewidth=0.8 if noisy else 1.8)
            if noisy:
                ax.plot(steps, smooth(values, half_width=len(values) // 40), color=colour, linewidth=1.8)
            ax.plot([], [], color=colour, linewidth=1.8, label=arm)
        ax.set_title(PANELS[name], fontsize=10, color=INK, loc="left")
        ax.set_xlabel("optimiser step", fontsize=9)
        ax.grid(color=FAINT, linewidth=0.6)
    axes[0].legend(fontsize=9, frameon=False)
    return save(figure, path)


def plot_bits_per_byte(results: BitsPerByte, path: Path, *, errors: BitsPerByte | None = None) -> Path | None:
    """Draws bits per byte of every model, one panel of bars per domain, on one scale from zero.

    Args:
        results: model -> domain -> bits per byte.
        path: PNG file to write.
        errors: standard errors in the same form, drawn as bars of two each way; a model or a domain may be missing.

    Returns:
        `path`, or None without results.
    """
    columns, rows = layout(results)
    if not columns:
        return None
    width = _columns(len(columns))
    figure, axes = grid(len(columns), columns=width, width=4.2, height=0.9 + 0.3 * len(rows))
    largest = max((results[model].get(c, 0.0) for model, _ in rows for c in columns), default=1.0)
    for index, (column, ax) in enumerate(zip(columns, axes, strict=True)):
        values = [results[model].get(column) for model, _ in rows]
        widths = [2 * (errors or {}).get(model, {}).get(column, 0.0) for model, _ in rows]
        _bars(ax, [model for model, _ in rows], values, texts=[cells[index][0] for _, cells in rows], widths=widths)
        ax.set_xlim(0, largest * 1.18)
        ax.set_title(column, fontsize=10, color=INK, loc="left")
        ax.set_xlabel("bits per byte", fontsize=9)
        if index % width:
            ax.set_yticklabels([])
    return save(figure, path)


def plot_shares(shares: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> Path | None:
    """Draws parts of a whole as stacked bars: what became of positions, which source won.

    Args:
        shares: bar -> part -> count or share; each bar is scaled to 100 %. Bars that sum to zero are left out.
        path: PNG file to write.
        title: what the parts are parts of.

    Returns:
        `path`, or None where there is nothing to draw.
    """
    shares = {bar: parts for bar, parts in shares.items() if sum(parts.values()) > 0}
    if not shares:
        return None
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    figure, (ax,) = grid(1, columns=1, width=8.4, height=1.5 + 0.38 * len(shares))
    left = [0.0] * len(shares)
    for number, part in enumerate(parts):
        colour = OUTCOMES.get(part) or ROLES.get(part) or SOURCES[number % len(SOURCES)]
        share = [100 * row.get(part, 0.0) / sum(row.values()) for row in shares.values()]
        ax.barh(list(shares), share, left=left, height=0.66, color=colour, label=part)
        for y, (start, length) in enumerate(zip(left, share, strict=True)):
            if length >= 4:  # a narrower piece has no room for its number
                ax.text(
                    start + length / 2,
                    y,
                    f"{length:.1f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=INK if part in PALE else "white",
                )
        left = [start + length for start, length in zip(left, share, strict=True)]
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("per cent", fontsize=9)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    figure.legend(fontsize=9, frameon=False, ncols=min(6, len(parts)), loc="outside lower center")
    return save(figure, path)


def plot_alignment(
    outcomes: Mapping[str, float], sizes: Mapping[str, float], path: Path, *, agreement: float | None
) -> Path:
    """Draws what became of the target's positions, and how coarse the symbols of the aligned ones are.

    Args:
        outcomes: `aligned`, `conditioned`, `dropped` -> number of positions.
        sizes: class of group sizes -> share of the agreeing positions.
        path: PNG file to write.
        agreement: share of aligned positions whose true next tokens have the same symbol.
    """
    figure, (left, right) = grid(2, columns=2, width=4.6, height=2.6)
    total = max(sum(outcomes.values()), 1)
    agree = outcomes.get("aligned", 0.0) * (agreement or 0.0)
    bars = {
        "aligned, same symbol": (agree, OUTCOMES["aligned"]),
        "aligned, other symbol": (outcomes.get("aligned", 0.0) - agree, FUSIONS[0]),
        "conditioned": (outcomes.get("conditioned", 0.0), OUTCOMES["conditioned"]),
        "dropped": (outcomes.get("dropped", 0.0), OUTCOMES["dropped"]),
    }
    shares = {name: (100 * count / total, colour) for name, (count, colour) in bars.items() if count}
    _percent_bars(left, {name: share for name, (share, _) in shares.items()}, [c for _, c in shares.values()])
    left.set_title("Target positions", fontsize=10, color=INK, loc="left")
    _percent_bars(right, {name: 100 * share for name, share in sizes.items()}, [OUTCOMES["aligned"]] * len(sizes))
    right.set_title("Size of the true symbol's group (target tokens)", fontsize=10, color=INK, loc="left")
    for ax, what in ((left, "per cent of positions"), (right, "per cent of agreeing positions")):
        ax.set_xlabel(what, fontsize=9)
    return save(figure, path)


def _percent_bars(ax: Axes, values: Mapping[str, float], colours: Sequence[str]) -> None:
    ax.barh(list(values), list(values.values()), color=list(colours), height=0.66)
    for y, value in enumerate(values.values()):
        ax.text(value, y, f" {value:.1f}" if value >= 0.05 or not value else f" {value:.2g}", va="center", fontsize=8)
    ax.set_xlim(0, max(values.values(), default=1.0) * 1.15 or 1.0)
    ax.invert_yaxis()


def colour_of(name: str, number: int) -> str:
    """Returns the colour of a model: by role or name, so that figures agree; sources by their number."""
    if name.startswith("source:"):
        return SOURCES[number % len(SOURCES)]
    return ROLES.get(name, FUSIONS[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(FUSIONS)])


def _bars(
    ax: Axes, names: Sequence[str], values: Sequence[float | None], *, texts: Sequence[str], widths: Sequence[float]
) -> None:
    colours = [colour_of(name, number) for number, name in enumerate(names)]
    lengths = [value or 0.0 for value in values]
    bars = {"xerr": widths, "error_kw": {"ecolor": INK, "elinewidth": 0.8, "capsize": 2}} if any(widths) else {}
    ax.barh(range(len(names)), lengths, color=colours, height=0.66, **bars)
    for y, (length, width, text) in enumerate(zip(lengths, widths, texts, strict=True)):
        ax.text(length + width, y, f" {text}", va="center", fontsize=8, color=INK)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()


def _columns(count: int) -> int:
    return 2 if count in (2, 4) else min(3, count)


def grid(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `count` plain axes; width and height of each in inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = []
    for index in range(count):
        ax = figure.add_subplot(rows, columns, index + 1)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
        axes.append(ax)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file without what would differ from run to run; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})
    return path
