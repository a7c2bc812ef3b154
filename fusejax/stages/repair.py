"""Making damaged artefacts of a run again, and nothing else.

A captured artefact keeps its good shards: the bad ones are removed, and the capture goes on as after a kill. Every
other artefact is made again from its parents by its stage. Both need the run's `config.yaml`, and give the bytes
that were lost where the machine and the versions are the same; what came out is compared with the old manifest.
"""

__all__ = ["repair"]

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from fusejax.config import load_config
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, SCHEMA_VERSION, Manifest, fingerprint_of, read_manifest
from fusejax.io.progress import say
from fusejax.io.store import damaged_records, reopen, shard_index
from fusejax.stages.capture import capture_identity, describe
from fusejax.stages.context import Run
from fusejax.stages.resume import REPLACED
from fusejax.stages.run import STAGES

_STAGE_OF = {
    "corpus": "prepare",
    "captured": "capture",
    "aligned": "align",
    "fused": "fuse",
    "models": "train",
    "scores": "evaluate",
    "scores-prompt": "evaluate",
    "scores-valid": "evaluate",
    "tasks": "evaluate",
    "export": "export",
}


def repair(damage: Mapping[Path, Mapping[str, str]]) -> list[str]:
    """Makes damaged artefacts again.

    Args:
      damage: artefact directory -> file -> what is wrong with it.

    Returns:
      What was done, a line per artefact.

    Raises:
      InputError: an artefact that belongs to no run, or that no stage makes.
    """
    by_run: dict[Path, list[Path]] = {}
    for directory in damage:
        by_run.setdefault(_run_directory(directory), []).append(directory)
    for root, directories in by_run.items():
        for directory in directories:
            _stage(root, directory, ())  # refuses before anything is touched
    return [line for root, directories in by_run.items() for line in _repair_run(root, directories, damage)]


def _repair_run(root: Path, directories: list[Path], damage: Mapping[Path, Mapping[str, str]]) -> list[str]:
    """Repairs artefacts of one run, parents first, leaving its configuration as it is."""
    run = Run(load_config(root / "config.yaml").model_copy(update={"output": str(root)}))
    merges = [merge.name for merge in run.config.merge]
    done = []
    for stage, make in STAGES.items():
        of_stage = [directory for directory in directories if _stage(root, directory, merges) == stage]
        before, removed = {directory: _manifest(directory) for directory in of_stage}, {}
        for directory in of_stage:
            if stage == "capture":
                removed[directory] = _remove_bad_shards(run, directory, damage[directory])
            else:
                shutil.rmtree(directory)
                removed[directory] = "all of it"
            say(f"{directory}: {stage} makes {removed[directory]} again")
        if of_stage:
            make(run)
        done += [f"{d}: {removed[d]} made again, {_compared(before[d], _manifest(d))}" for d in of_stage]
    return done


def _run_directory(directory: Path) -> Path:
    for parent in directory.resolve().parents:
        if (parent / "config.yaml").is_file():
            return parent
    raise InputError(f"{directory} belongs to no run (no config.yaml above it): copy it again from where it came")


def _stage(root: Path, directory: Path, merges: Collection[str]) -> str:
    parts = directory.resolve().relative_to(root).parts
    if parts[0] not in _STAGE_OF or any(REPLACED in part for part in parts):
        raise InputError(f"no stage of {root / 'config.yaml'} makes {directory}: copy it again from where it came")
    return "merge" if parts in {("models", name) for name in merges} else _STAGE_OF[parts[0]]


def _manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except InputError:
        return None


def _remove_bad_shards(run: Run, directory: Path, bad: Mapping[str, str]) -> str:
    """Leaves an unfinished artefact of the good shards; returns what is missing now."""
    name = directory.name
    if name not in run.participants:
        raise InputError(f"{run.directory / 'config.yaml'} has no source {name!r}, of which {directory} is the capture")
    ref = run.participants[name]
    settings, parents = capture_identity(run, ref, describe(run, ref))
    identity = {"kind": "captured", "settings": settings, "parents": parents, "schema": SCHEMA_VERSION}
    manifest = _manifest(directory)
    if manifest is None or manifest.fingerprint != fingerprint_of(identity):
        shutil.rmtree(directory)  # nothing proves that its shards belong to this configuration
        return "all of it"
    shards = {name for name in bad if shard_index(name) is not None}
    if MANIFEST in bad:  # its checksums are not to be trusted, those of the records are
        present = [path for path in directory.iterdir() if shard_index(path.name) is not None]
        shards |= {path.name for path in present if damaged_records(path) != []}
    for shard in shards:
        (directory / shard).unlink(missing_ok=True)
    reopen(directory, kind="captured", settings=settings, parents=parents, shard_size=settings["shard_size"])
    return ", ".join(sorted(shards)) or "the manifest and the index"


def _compared(before: Manifest | None, after: Manifest | None) -> str:
    if after is None:
        return "which failed"
    if before is None:
        return "not compared: the old manifest could not be read"
    changed = sorted(name for name in before.files if after.files.get(name) != before.files[name])
    return f"with other bytes in {', '.join(changed)}" if changed else "with the same bytes as before"
