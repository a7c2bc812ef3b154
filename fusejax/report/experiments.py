"""The figures of an experiment: differences from the baseline with their errors, and held-out loss over tokens."""

__all__ = ["plot_curves", "plot_differences"]

from collections.abc import Mapping
from pathlib import Path

from fusejax.report.plots import grid, save
from fusejax.report.style import FAINT, INK

_BETTER, _WORSE, _UNSURE = "#3a8f5f", "#b23a48", "#9aa5b1"
_LINES = ("#2f6fb5", "#d9662b", "#3a8f5f", "#7d5ba6", "#b8a04a", "#b5658b", "#5aa7a7", "#335c67")


def plot_differences(
    differences: Mapping[str, tuple[float, float | None]], path: Path, *, baseline: str
) -> Path | None:
    """Draws each arm's difference from the baseline, left of zero where it is better.

    Args:
        differences: arm -> (difference in bits per byte, its standard error or None).
        path: PNG file to write.
        baseline: what zero stands for.

    Returns:
        `path`, or None where nothing is compared.
    """
    if not differences:
        return None
    figure, (ax,) = grid(1, columns=1, width=8.4, height=1.1 + 0.26 * len(differences))
    sizes = sorted(abs(value) for value, _ in differences.values())
    limit = max(5 * sizes[len(sizes) // 2], 1e-6)  # a few that are far out must not squeeze the others
    limit = min(limit, 1.2 * sizes[-1]) or limit
    for y, (value, error) in enumerate(differences.values()):
        sure = error is not None and abs(value) > 2 * error
        colour = (_BETTER if value < 0 else _WORSE) if sure else _UNSURE
        if abs(value) > limit:
            ax.plot(limit if value > 0 else -limit, y, ">" if value > 0 else "<", color=colour, markersize=6)
        else:
            bar = None if error is None else 2 * error
            ax.errorbar(value, y, xerr=bar, fmt="o", color=colour, capsize=3, markersize=5)
        ax.text(1.01, y, f"{value:+.4f}", transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=INK)
    ax.set_xlim(-1.08 * limit, 1.08 * limit)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(differences)), list(differences), fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="x", color=FAINT, linewidth=0.6)
    ax.set_xlabel(
        f"bits per byte less those of {baseline}; bars: two standard errors; grey: one seed, or within them; "
        "triangles: further out",
        fontsize=8,
    )
    return save(figure, path)


def plot_curves(curves: Mapping[str, Mapping[str, list[float]]], path: Path) -> Path | None:
    """Draws held-out bits per byte over the tokens of training.

    Args:
        curves: arm -> {"tokens", "valid"}, of the same length.
        path: PNG file to write.

    Returns:
        `path`, or None without curves.
    """
    if not curves:
        return None
    figure, (ax,) = grid(1, columns=1, width=8.4, height=4.2)
    for number, (arm, curve) in enumerate(curves.items()):
        colour = _LINES[number % len(_LINES)]
        style = "-" if number < len(_LINES) else "--"
        ax.plot(curve["tokens"], curve["valid"], style, color=colour, linewidth=1.6, label=arm)
    ax.set_xlabel("tokens of training", fontsize=9)
    ax.set_ylabel("bits per byte, held out", fontsize=9)
    ax.grid(color=FAINT, linewidth=0.6)
    ax.legend(fontsize=8, frameon=False)
    return save(figure, path)
