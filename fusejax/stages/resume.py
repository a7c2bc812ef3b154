"""Whether a training may go on from what lies in its directory, and what becomes of what it may not go on from.

`plan.json` says what determines the result ("settings") and how it is computed ("how"). Mesh, micro-batches, remat,
attention kernel and the number of processes move a result by rounding alone: with others a training goes on, and a
finished model is finished. Everything else makes another training. Its checkpoints are never removed for that: the
run stops, or starts afresh where it is told to. What gives way, here or when a finished model is made again, is
renamed to `<name>.replaced` beside it and left to the user.
"""

__all__ = ["REPLACED", "determining", "finished_model", "set_aside", "settle"]

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fusejax.errors import InputError
from fusejax.io.checkpoint import all_steps
from fusejax.io.manifest import MANIFEST, Manifest, fingerprint_of, read_manifest, write_json
from fusejax.io.progress import say

REPLACED = ".replaced"
_PLAN = "plan.json"
_ROUNDING = {"mesh", "accumulation", "remat", "attention", "sequence_parallel"}


def determining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training, and of its sections, that change more than its rounding."""
    return {
        name: {key: kept for key, kept in value.items() if key not in _ROUNDING} if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _ROUNDING
    }


def finished_model(directory: Path, *, settings: Mapping[str, Any], parents: Mapping[str, str]) -> Manifest | None:
    """Returns the manifest of a trained model with these determining settings and parents, else None."""
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    theirs = [manifest.kind, determining(manifest.settings), manifest.parents]
    return manifest if fingerprint_of(theirs) == fingerprint_of(["model", dict(settings), dict(parents)]) else None


def settle(
    directory: Path, settings: Mapping[str, Any], how: Mapping[str, Any], *, on_changed: Literal["stop", "restart"]
) -> None:
    """Makes a training's directory ready to go on, or to begin.

    Args:
      directory: of the training, with its `checkpoints`.
      settings: JSON values, what determines the result.
      how: JSON values, what does not; only recorded.
      on_changed: whether checkpoints of other settings stop the run, or the training begins and they are set aside.

    Raises:
      InputError: such checkpoints; names every setting that differs, with both values.
    """
    plan = json.loads(json.dumps({"settings": settings, "how": how}, default=str))
    plan = {"plan": fingerprint_of(plan["settings"]), **plan}
    old = _read_plan(directory)
    if old.get("plan") == plan["plan"]:
        if moved := _differences(old.get("how", {}), plan["how"]):
            say(f"{directory}: goes on, but for rounding the same; {'; '.join(moved)}")
    elif _held(directory):
        steps = all_steps(directory / "checkpoints")
        if steps and on_changed == "stop":
            raise InputError(_refusal(directory, steps[-1], old, plan))
        say(f"{directory}: settings or inputs have changed, training starts afresh")
        set_aside(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / _PLAN, plan)


def set_aside(path: Path) -> Path:
    """Renames a directory to a free name beside it and says so; returns the name."""
    aside, number = path.with_name(path.name + REPLACED), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{REPLACED}-{number}")
    os.replace(path, aside)
    say(f"{path}: what was there is kept as {aside.name}; remove it when you do not need it")
    return aside


def _refusal(directory: Path, step: int, old: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    if "settings" in old:
        differ = _differences(old["settings"], plan["settings"])
        told = "of a training with other settings or inputs:\n  " + "\n  ".join(differ) + "\nSet these back to go on"
    else:
        told = f"and its {_PLAN} does not say of which settings\nGo on with what wrote it"
    return (
        f"{directory} holds checkpoints up to step {step} {told}; or keep both, with another `output` or name; or "
        f"start afresh with faults.on_changed_settings restart: the old ones are kept as {directory.name}{REPLACED}"
    )


def _read_plan(directory: Path) -> dict[str, Any]:
    path = directory / _PLAN
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _held(directory: Path) -> bool:
    return any(path.is_file() and path.name != _PLAN for path in directory.rglob("*"))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per value that differs; of one that is told twice, in a section and beside it, the first."""
    then, now, lines = dict(_flat(old)), dict(_flat(new)), {}
    for key in then | now:
        values = tuple(json.dumps(side[key]) if key in side else "not set" for side in (then, now))
        if values[0] != values[1]:
            lines.setdefault((key.rpartition(".")[2], *values), f"{key}: {values[0]} then, {values[1]} now")
    return list(lines.values())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
