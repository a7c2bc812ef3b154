"""From rows to a table: means over seeds, standard errors, and differences from the baseline, seed by seed.

The baseline of a seed starts from the same target and reads the same text in the same order, so the difference has
much less spread than either; its standard error is that of the differences. With one seed there is none.
"""

__all__ = ["Summary", "markdown", "summarize", "write_results"]

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.config.experiment import ExperimentConfig
from fusejax.io.manifest import write_json
from fusejax.report.experiments import plot_curves, plot_differences
from fusejax.stages.experiments.arms import Row


class Summary(NamedTuple):
    """An arm over its seeds; bits per byte of the test text."""

    arm: str
    seeds: int
    chosen: Any
    mean: dict[str, float]  # domain (and "mean") -> mean over seeds
    error: float | None  # standard error of "mean"
    difference: float | None  # of "mean" from the baseline of the same seeds
    difference_error: float | None
    valid: float  # "mean" on valid text
    supervised: float | None
    tokens: int


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    centre = _mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def summarize(rows: Sequence[Row], *, baseline: str) -> list[Summary]:
    """Summarises arms in the order in which they first come.

    Args:
      rows: of all arms and seeds.
      baseline: the arm that the others are compared with.
    """
    by_arm: dict[str, list[Row]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    reference = {row.seed: row.bits_per_byte["test"]["mean"] for row in by_arm.get(baseline, [])}
    return [_summary(arm, found, reference if arm != baseline else {}) for arm, found in by_arm.items()]


def _summary(arm: str, rows: Sequence[Row], reference: Mapping[int, float]) -> Summary:
    tests = [row.bits_per_byte["test"] for row in rows]
    differences = [row.bits_per_byte["test"]["mean"] - reference[row.seed] for row in rows if row.seed in reference]
    supervised = [row.supervised for row in rows if row.supervised is not None]
    return Summary(
        arm,
        len(rows),
        rows[0].chosen,
        {domain: _mean([test[domain] for test in tests]) for domain in tests[0]},
        _error([test["mean"] for test in tests]),
        _mean(differences) if differences else None,
        _error(differences),
        _mean([row.bits_per_byte["valid"]["mean"] for row in rows]),
        _mean(supervised) if supervised else None,
        max(row.tokens for row in rows),
    )


def markdown(found: Sequence[Summary], *, baseline: str, tuned: str | None) -> str:
    """The table: arms by domains, with the difference from the baseline."""
    domains = list(dict.fromkeys(domain for row in found for domain in row.mean if domain != "mean"))
    several = len(domains) > 1
    head = ["arm", "seeds", *(domains if several else []), "mean", f"less {baseline}"]
    head += [tuned.rpartition(".")[2].replace("_", " ")] if tuned else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in found:
        cells = [row.arm, str(row.seeds)]
        cells += [f"{row.mean[domain]:.3f}" if domain in row.mean else "" for domain in domains if several]
        cells.append(f"{row.mean['mean']:.4f}" + (f" ± {row.error:.4f}" if row.error is not None else ""))
        cells.append(_signed(row.difference, row.difference_error))
        if tuned:
            cells.append("" if row.chosen is None else f"{row.chosen:g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _signed(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}".replace("-", "−") + (f" ± {error:.4f}" if error is not None else "")


def _made_here(experiment: ExperimentConfig, name: str) -> bool:
    """Whether an arm is trained or merged: models that were there, and ensembles, are too far off for one picture."""
    arm = experiment.arm(name)
    return not (arm.model or arm.ensemble)


def write_results(
    experiment: ExperimentConfig, rows: Sequence[Row], out: Path, *, command: str, facts: Mapping[str, Any]
) -> str:
    """Writes NAME.json, NAME.md and NAME.png into `out`; returns the table.

    Args:
      experiment: what was asked.
      rows: what was found.
      out: directory of results.
      command: that makes them again.
      facts: versions, device, seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = summarize(rows, baseline=experiment.baseline)
    tuned = next(iter(experiment.tune), None)
    table = markdown(found, baseline=experiment.baseline, tuned=tuned)
    write_json(
        out / f"{experiment.name}.json",
        {
            "experiment": experiment.model_dump(mode="json"),
            "command": command,
            "machine": platform.machine(),
            **facts,
            "summary": [row._asdict() for row in found],
            "rows": [row._asdict() for row in rows],
        },
    )
    compared = [row for row in found if _made_here(experiment, row.arm)]
    made = [
        plot_differences(
            {row.arm: (row.difference, row.difference_error) for row in compared if row.difference is not None},
            out / f"{experiment.name}.png",
            baseline=experiment.baseline,
        ),
        plot_curves(
            {row.arm: row.curve for row in rows if row.curve and row.seed == min(r.seed for r in rows)},
            out / f"{experiment.name}-curves.png",
        ),
    ]
    notes = [f"![{experiment.title}]({path.name})\n" for path in made if path is not None]
    text = f"""# {experiment.title}

{experiment.question.strip()}

Bits per byte of held-out text (lower is better), mean over seeds ± standard error; differences are taken seed by seed.

{table}
{"".join(notes)}
Command: `{command}`, {facts["seconds_of_rows"] / 60:.0f} minutes for all rows one after another on {facts["device"]};
versions in the JSON file.
"""
    (out / f"{experiment.name}.md").write_text(text, encoding="utf-8")
    return table
