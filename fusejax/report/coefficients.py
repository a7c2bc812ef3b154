"""A heat map of merge coefficients: which target shaped which matrix.

One panel per target; a row per kind of matrix, a column per layer, and one more column for the tensors outside the
layers. All panels share one scale from 0 to the largest coefficient, so that they can be compared.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ["plot_coefficients"]

_LAYER = re.compile(r"^(.*\.)?(?:layers|h|blocks|layer)\.(\d+)\.(.+?)(?:\.weight)?$")


def plot_coefficients(coefficients: Mapping[str, Sequence[float]], targets: Sequence[str], path: Path) -> Path | None:
    """Draws the coefficient of every target in every matrix.

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
    image = None
    for ax, values, name in zip(axes, grid, targets, strict=True):
        image = ax.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(len(kinds)), kinds, fontsize=7)
        shown = range(0, len(columns), max(1, len(columns) // 8))
        ax.set_xticks(list(shown), [columns[i] for i in shown], fontsize=7)
        ax.set_xlabel("layer", fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
        bar.set_label("coefficient", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})
    return path


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
