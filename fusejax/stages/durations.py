"""How long the stages of a run took: one line per stage and call, appended to `stages.jsonl`.

Appended, because several processes may work on the same run, each at another fusion.
"""

__all__ = ["note_duration", "read_durations"]

import json
from pathlib import Path

FILE = "stages.jsonl"


def note_duration(directory: Path, stage: str, seconds: float) -> None:
    """Notes that a stage of the run in `directory` took this long."""
    with open(directory / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(seconds, 2)}) + "\n")


def read_durations(directory: Path) -> dict[str, float]:
    """Returns stage -> seconds of all its calls; a line that a killed process left unfinished is left out."""
    found: dict[str, float] = {}
    path = directory / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["stage"]] = found.get(row["stage"], 0.0) + row["seconds"]
    return found
