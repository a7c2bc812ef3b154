"""The figures of a report, as SVG files drawn by matplotlib: no display, no browser, no global state.

One small figure per quantity, so that a page sets as many side by side as fit. Text stays text, in the reader's font;
ink and grid follow the reader's light or dark. Series that a run did not record are left out, an empty figure is not
written. Colours follow the role of a model, not its rank, so that two reports can be compared.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fusejax.report.metrics import Series, smooth
from fusejax.report.style import FAINT, FUSIONS, INK, THEME

__all__ = ["Curve", "curve_of", "grid", "plot_alignment", "plot_curves", "plot_dots", "save", "save_svg"]

OUTCOMES = {"aligned": "#46637f", "conditioned": "#86a0b8", "dropped": "#cdd7e0"}
WIDTH, HEIGHT = 3.7, 2.5  # inches of one figure
MOST_POINTS = 600  # of a curve


class Curve(NamedTuple):
    """A series over the optimiser step, with its colour."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: str


def curve_of(series: Series, name: str, colour: str, *, scale: float = 1.0) -> Curve | None:
    """Returns a recorded series as a curve; None where it was not recorded, or is a term that an arm does not have."""
    steps, values = series.get(name, ([], []))
    return Curve(steps, [scale * value for value in values], colour) if any(values) else None


def plot_curves(curves: Mapping[str, Curve | None], path: Path, *, title: str, noisy: bool = True) -> Path | None:
    """Draws curves over the optimiser step; noisy ones pale as recorded, dark as their moving average.

    Args:
        curves: name -> curve; None is left out.
        path: SVG file to write.
        title: what the values are, and their unit.
        noisy: whether long curves are smoothed.

    Returns:
        `path`, or None where there is no curve.
    """
    drawn = {name: curve for name, curve in curves.items() if curve is not None}
    if not drawn:
        return None
    figure, ax = _figure(title)
    for number, (steps, values, colour) in enumerate(drawn.values()):
        smoothed = noisy and len(values) > 20
        stride = -(-len(values) // MOST_POINTS)
        wide = max(1.2, 2.8 - 0.8 * number)  # equal curves lie on each other: the lower is seen beside the upper
        pale: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.8} if smoothed else {"linewidth": wide}
        marker = "o" if len(values) <= 2 else None
        ax.plot(steps[::stride], values[::stride], color=colour, marker=marker, markersize=4, **pale)
        if smoothed:
            reach = max(2, len(values) // 20)
            whole = slice(reach, -reach, stride)  # where the window is whole
            ax.plot(steps[whole], smooth(list(values), half_width=reach)[whole], color=colour, linewidth=wide)
    ax.set_xlabel("optimiser step", fontsize=8, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if max(abs(y) for curve in drawn.values() for y in curve.values) >= 1000:
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return save_svg(figure, path)


def plot_dots(
    values: Mapping[str, float],
    errors: Mapping[str, float],
    path: Path,
    *,
    title: str,
    colours: Mapping[str, str],
    digits: int = 3,
) -> Path | None:
    """Draws one dot per model, with its value, and a line to both sides where its error is known.

    Args:
        values: model -> value; not all models need one.
        errors: model -> length of the line on each side.
        path: SVG file to write.
        title: what the values are.
        colours: of the models.
        digits: decimals of the printed values.

    Returns:
        `path`, or None without finite values.
    """
    rows = [(name, value) for name, value in values.items() if math.isfinite(value)]
    if not rows:
        return None
    figure, ax = _figure(title, height=0.75 + 0.22 * len(rows))
    for y, (name, value) in enumerate(rows):
        ax.errorbar(value, y, xerr=errors.get(name), fmt="o", color=colours[name], markersize=5, elinewidth=1.6)
        ax.annotate(f"{value:.{digits}f}", (1.02, y), xycoords=("axes fraction", "data"), **_SMALL)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8, color=INK)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    return save_svg(figure, path)


_SMALL = {"va": "center", "fontsize": 8, "color": INK, "annotation_clip": False}


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


def _figure(title: str, *, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ax = figure.add_subplot()
    _bare(ax)
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.grid(color=FAINT, linewidth=0.6)
    return figure, ax


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    ax.set_axisbelow(True)


def grid(count: int, *, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `count` plain axes; width and height of each in inches."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for ax in axes:
        _bare(ax)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file without what would differ from run to run; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})
    return path


def save_svg(figure: Figure, path: Path) -> Path:
    """Writes a figure whose ink and grid follow the reader's light or dark; the same figure gives the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fusejax", "font.family": "sans-serif"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    for colour, (variable, _) in THEME.items():
        text = text.replace(colour, f"var({variable})")
    light = "".join(f"{variable}:{colour};" for colour, (variable, _) in THEME.items())
    dark = "".join(f"{variable}:{colour};" for variable, colour in THEME.values())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    text = text.replace("<defs>", f"{style}<defs>", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
