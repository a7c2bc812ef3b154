"""Reads `metrics.jsonl`: one JSON object per line with a `step` and numbers.

A run that was interrupted and continued writes some steps twice, and a run that is being written may end in
half a line: the last value of a step counts, an unfinished last line is left out. Anything else that is not
JSON is an error, not a gap in a curve.
"""

import json
from pathlib import Path
from typing import Any

from fusejax.errors import InputError

__all__ = ["Series", "read_series", "smooth"]

Series = dict[str, tuple[list[float], list[float]]]  # name -> (steps, values)


def read_series(path: Path) -> Series:
    """Returns every numeric series of a metrics file.

    Args:
        path: file of JSON lines; lines without an integer `step` (notes, settings) are not part of a curve.

    Returns:
        name -> (steps ascending, values), both of the same length; booleans, text and nested values left out.

    Raises:
        InputError: the file is missing, or a line before the last is not a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(
            f"Cannot read the metrics {path}: {error.strerror}. Give the file that `train` wrote."
        ) from None
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line, path=path, number=number, is_last=number == len(lines))
        if row is None or not isinstance(row.get("step"), int):
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[row["step"]] = float(value)
    return {name: _in_order(values) for name, values in found.items()}


def smooth(values: list[float], *, half_width: int) -> list[float]:
    """Returns the centred moving average of a series, its window cut evenly at both ends: no lag, no bias."""
    last = len(values) - 1
    result = []
    for index in range(len(values)):
        reach = min(index, last - index, half_width)
        window = values[index - reach : index + reach + 1]
        result.append(sum(window) / len(window))
    return result


def _in_order(values: dict[int, float]) -> tuple[list[float], list[float]]:
    steps = sorted(values)
    return [float(step) for step in steps], [values[step] for step in steps]


def _parse(line: str, *, path: Path, number: int, is_last: bool) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        if is_last:  # no newline after it: still being written, or cut by a kill
            return None
        raise InputError(
            f"{path}, line {number}: not JSON. Expected one object per line; was the file edited?"
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
    return row
