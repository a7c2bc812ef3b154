"""Manifests: what an artefact is, what made it, and the checksums that prove it whole.

Every artefact directory holds a `manifest.json`, written last and atomically: a directory without one is
unfinished work. A manifest names its kind and schema version, the fusejax version, the part of the
configuration that determines its content, the fingerprints of its parents, and size and xxh3 checksum of each
file. `fingerprint` hashes what determines the content and nothing else (no path, no date), so a stage can tell
"done", "changed" and "unfinished" apart without reading data.

Deliberately not here: signatures. A checksum finds damage, not malice.
"""

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Manifest",
    "atomic_directory",
    "damaged_files",
    "file_checksum",
    "fingerprint_of",
    "read_manifest",
    "verify_directory",
    "write_json",
    "write_manifest",
]

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from fusejax.errors import InputError
from fusejax.io.progress import beat

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_MAX_MANIFEST_BYTES = 200_000_000
_NO_CHECKSUM = "0" * 32


class Manifest(NamedTuple):
    """The contents of a `manifest.json`."""

    kind: str  # "corpus", "captured", "aligned", "fused", "model", ...
    fingerprint: str  # hash of kind, settings and parents
    settings: dict[str, Any]  # what determines the content
    parents: dict[str, str]  # name -> fingerprint
    facts: dict[str, Any]  # counts and measurements, free to differ between runs
    files: dict[str, dict[str, Any]]  # relative path -> {"bytes": n, "xxh3": hex}, shards also {"records": n}
    version: str  # of fusejax
    schema: int
    checksum: str = ""  # xxh3-128 of the file with zeros in this place


def fingerprint_of(value: Any) -> str:
    """Returns the xxh3-128 hex digest of a JSON-able value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def file_checksum(path: Path) -> str:
    """Returns the xxh3-128 hex digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            beat()
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to `path` so that a reader sees either the old file or the whole new one."""
    _write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(
    directory: Path,
    *,
    kind: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Manifest:
    """Checksums every file under `directory` and writes its manifest, last and atomically.

    Args:
      directory: of the artefact, finished but for its manifest.
      kind, settings, parents: the artefact's identity.
      facts: counts and measurements.
      counts: records in each file that holds records.
    """
    from fusejax import __version__

    directory = Path(directory)
    files: dict[str, dict[str, Any]] = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for name, count in (counts or {}).items():
        files[name]["records"] = count
    identity = {"kind": kind, "settings": dict(settings), "parents": dict(parents or {}), "schema": SCHEMA_VERSION}
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint_of(identity),
        settings=dict(settings),
        parents=dict(parents or {}),
        facts=dict(facts or {}),
        files=files,
        version=__version__,
        schema=SCHEMA_VERSION,
        checksum=_NO_CHECKSUM,
    )
    text = json.dumps(manifest._asdict(), indent=2, ensure_ascii=False, default=str) + "\n"
    manifest = manifest._replace(checksum=xxhash.xxh3_128_hexdigest(text.encode()))
    _write_whole(directory / MANIFEST, text.replace(_NO_CHECKSUM, manifest.checksum).encode())
    return manifest


def read_manifest(directory: Path, *, kind: str | None = None) -> Manifest:
    """Reads a manifest and refuses another kind or a newer schema.

    Raises:
      InputError: there is none, it cannot be parsed, or its kind or schema is not what is expected.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise InputError(f"{directory} holds no {MANIFEST}: it is not a finished artefact; run the stage that makes it")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes, over the limit of {_MAX_MANIFEST_BYTES}")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a fusejax manifest ({error}); delete {directory} and make it again") from error
    if manifest.schema != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema {manifest.schema}, this fusejax reads schema {SCHEMA_VERSION}; "
            "make the artefact again or use the fusejax that made it"
        )
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{directory} is a {manifest.kind!r} artefact, expected {kind!r}")
    return manifest


def verify_directory(directory: Path) -> list[str]:
    """Returns what is wrong with an artefact: files missing, of another size or changed, and its manifest."""
    directory = Path(directory)
    return [f"{directory / name}: {problem}" for name, problem in damaged_files(directory).items()]


def damaged_files(directory: Path, *, checksum: Callable[[Path], str] | None = None) -> dict[str, str]:
    """Returns {file: what is wrong with it} of an artefact; of a damaged manifest nothing else is believed.

    Every byte is read, unless another `checksum` of a file than `file_checksum` is given.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if problem := _damage_of_manifest(directory / MANIFEST, manifest):
        return {MANIFEST: problem}
    bad = {}
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            bad[name] = "missing"
        elif path.stat().st_size != entry["bytes"]:
            bad[name] = f"{path.stat().st_size} bytes, expected {entry['bytes']}"
        elif (checksum or file_checksum)(path) != entry["xxh3"]:
            bad[name] = "checksum differs from the manifest"
    return bad


def _damage_of_manifest(path: Path, manifest: Manifest) -> str:
    identity = {
        "kind": manifest.kind,
        "settings": manifest.settings,
        "parents": manifest.parents,
        "schema": manifest.schema,
    }
    if fingerprint_of(identity) != manifest.fingerprint:
        return "settings do not belong to the fingerprint"
    blank = path.read_bytes().replace(manifest.checksum.encode() or b"-", _NO_CHECKSUM.encode())
    if manifest.checksum and xxhash.xxh3_128_hexdigest(blank) != manifest.checksum:
        return "its own checksum does not fit: it was changed after it was written"
    return ""


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yields a temporary sibling directory that becomes `final` when the block ends without an error."""
    final = Path(final)
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
