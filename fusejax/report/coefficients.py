"""A heat map of merge coefficients: which target shaped which matrix.

One panel per target; a row per kind of matrix, a column per layer, and one more column for the tensors outside the
layers. All panels share one scale, so that they can be compared: from 0 to the largest coefficient, or, in a report,
from the smallest, as coefficients that differ little still differ.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusejax.report.plots import save_svg
from fusejax.report.style import FAINT, INK

__all__ = ["coefficient_figures", "plot_coefficients"]

_LAYER = re.compile(r"^(.*\.)?(?:layers|h|blocks|layer)\.(\d+)\.(.+?)(?:\.weight)?$")


def plot_coefficients(coefficients: Mapping[str, Sequence[float]], targets: Sequence[str], path: Path) -> Path | None:
    """Draws the coefficient of every target in every matrix, on a scale from 0.

    Args:
        coefficients: tensor name -> [J], one factor per target.
        targets: J names.
        path: the PNG file.

    Returns:
        The path, or None where there is nothing to draw.
    """
    if not coefficients:
        return None
    grid, kinds, columns = _grid(coefficients, len(targets))
    width = 1.6 + 0.16 * len(columns) * len(targets) + 1.2 * len(targets)
    figure = Figure(figsize=(min(max(width, 6), 40), 1.4 + 0.22 * len(kinds)), layout="constrained")
    axes = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    top = max(float(np.nanmax(grid)), 1e-9)
    _heat_maps(figure, list(axes), grid, targets, kinds=kinds, columns=columns, scale=(0.0, top))
    figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})
    return path


def coefficient_figures(
    coefficients: Mapping[str, Sequence[float]], targets: Sequence[str], stem: Path
) -> list[tuple[Path, str]]:
    """Draws one SVG file per target, `stem` with its number, on one scale from the smallest coefficient.

    Returns:
        The files with their descriptions; none where there is nothing to draw or all coefficients are equal.
    """
    if not coefficients:
        return []
    grid, kinds, columns = _grid(coefficients, len(targets))
    scale = (float(np.nanmin(grid)), float(np.nanmax(grid)))
    if scale[1] - scale[0] < 1e-9:
        return []
    drawn = []
    for number, (values, name) in enumerate(zip(grid, targets, strict=True)):
        figure = Figure(figsize=(5.4, 1.1 + 0.2 * len(kinds)), layout="constrained")
        axes = [figure.add_subplot()]
        _heat_maps(figure, axes, values[None], [name], kinds=kinds, columns=columns, scale=scale)
        path = save_svg(figure, stem.with_name(f"{stem.name}-{number}.svg"))
        drawn.append((path, f"Coefficient of {name} in every matrix, layer by layer"))
    return drawn


def _heat_maps(
    figure: Figure,
    axes: Sequence[Axes],
    grid: np.ndarray,
    targets: Sequence[str],
    *,
    kinds: Sequence[str],
    columns: Sequence[str],
    scale: tuple[float, float],
) -> None:
    image = None
    for ax, values, name in zip(axes, grid, targets, strict=True):
        image = ax.imshow(values, vmin=scale[0], vmax=scale[1], cmap="viridis", aspect="auto", interpolation="none")
        ax.set_title(name, fontsize=9, color=INK)
        ax.set_yticks(range(len(kinds)), kinds, fontsize=7, color=INK)
        shown = range(0, len(columns), max(1, len(columns) // 8))
        ax.set_xticks(list(shown), [columns[i] for i in shown], fontsize=7, color=INK)
        ax.set_xlabel("layer", fontsize=8, color=INK)
        ax.tick_params(color=FAINT)
        ax.spines[:].set_color(FAINT)
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
        bar.set_label("coefficient", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=7, labelcolor=INK, color=FAINT)
        bar.outline.set_visible(False)


def _grid(coefficients: Mapping[str, Sequence[float]], count: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Values [J, kinds, columns] (NaN where there is no such matrix), the kinds and the columns."""
    places = {}
    for name in coefficients:
        match = _LAYER.match(name)
        places[name] = (match[3], int(match[2])) if match else (name.removesuffix(".weight"), -1)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = sorted({layer for _, layer in places.values()})
    grid = np.full((count, len(kinds), len(layers)), np.nan)
    for name, (kind, layer) in places.items():
        grid[:, kinds.index(kind), layers.index(layer)] = coefficients[name]
    return grid, kinds, ["-" if layer < 0 else str(layer) for layer in layers]
