"""verify: every checksum of every artefact under a directory; with --repair, what is bad is made again.

The states of a training that has not finished are checked too; they cannot be made again, but an earlier one may be
whole (`faults.on_damaged_checkpoint: previous`).
"""

__all__ = ["command", "find_damage", "find_damaged_states"]

from pathlib import Path

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, damaged_files
from fusejax.io.progress import progress
from fusejax.io.store import damaged_records, shard_index
from fusejax.stages.command import Result, parser

Damage = dict[Path, dict[str, str]]  # artefact -> file -> what is wrong with it


def find_damage(artefacts: list[Path]) -> Damage:
    """Returns what is wrong with artefacts, down to the record; those that are whole are left out."""
    damage: Damage = {}
    with progress("verify", total=len(artefacts), unit="artefacts") as bar:
        for directory in artefacts:
            try:
                bad = damaged_files(directory)
            except InputError as error:
                bad = {MANIFEST: str(error)}
            if bad:
                damage[directory] = {name: _with_records(directory / name, bad[name]) for name in bad}
            bar.update(1)
    return damage


def find_damaged_states(directory: Path) -> tuple[int, Damage]:
    """Returns the number of saved train states under a directory, and what is wrong with which."""
    if not any(directory.rglob("checkpoints")):
        return 0, {}
    from fusejax.io.checkpoint import damaged_state, saved_states

    found = saved_states(directory)
    return len(found), {place: bad for place in found if (bad := damaged_state(place))}


def _with_records(path: Path, problem: str) -> str:
    """Adds to a shard's problem which of its records are damaged."""
    if shard_index(path.name) is None or not path.is_file():
        return problem
    records = damaged_records(path)
    if records is None:
        return f"{problem}; the shard cannot be read"
    shown = ", ".join(map(str, records[:20])) + (", ..." if len(records) > 20 else "")
    return f"{problem}; damaged records: {shown}" if records else f"{problem}; its records are whole"


def _lines(damage: Damage) -> list[str]:
    return [f"{directory / name}: {problem}" for directory, bad in damage.items() for name, problem in bad.items()]


def command(name: str, words: list[str]) -> Result:
    """`fusejax verify DIR [--repair]`: exit 0, or exit 2 and what is bad."""
    arguments = parser(name, "Check size and checksum of every file listed by a manifest under DIR.")
    arguments.add_argument("directory", type=Path, help="artefact, model or run directory")
    arguments.add_argument(
        "--repair", action="store_true", help="make bad artefacts of a run again: of a capture only the bad shards"
    )
    given = arguments.parse_args(words)
    found = sorted(path.parent for path in given.directory.rglob(MANIFEST))
    count, states = find_damaged_states(given.directory)
    if not found and not count:
        raise InputError(f"no {MANIFEST} under {given.directory}: there is nothing to verify")
    damage = find_damage(found)
    bad, repaired = _lines(damage) + _lines(states), []
    text = (
        f"{len(found)} artefacts, "
        + (f"{count} train states, " if count else "")
        + (f"{len(bad)} bad:\n  " + "\n  ".join(bad) if bad else "all good")
    )
    if given.repair and damage:
        from fusejax.stages.repair import repair

        repaired = repair(damage)
        bad = _lines(find_damage([directory for directory in damage if (directory / MANIFEST).is_file()]))
        bad += _lines(states)
        text += "\nrepaired:\n  " + "\n  ".join(repaired)
        text += "\nstill bad:\n  " + "\n  ".join(bad) if bad else "\nall good now"
    data = {"artefacts": len(found), "train_states": count, "bad": bad} | (
        {"repaired": repaired} if given.repair else {}
    )
    return Result(data, text, exit_code=2 if bad else 0)
