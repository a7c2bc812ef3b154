"""Checksums of large files, remembered between runs: 13 GB of weights take a minute to read from a disk.

What is remembered lies outside of the artefacts, one small file per path, and is believed only while size, times,
inode and device of the file are those of then. Times have a resolution: a file that was written within the last
seconds could change again without showing, so its checksum is not kept (git calls this racily clean). Whatever is
unreadable or disagrees is hashed again.

Damage that leaves a file's metadata alone is not seen here. `fusejax verify` reads every byte.
"""

__all__ = ["remembered_checksum"]

import contextlib
import json
import os
import time
from pathlib import Path

import xxhash

from fusejax.io.manifest import file_checksum, write_json

_LEAST_BYTES = 16 << 20  # smaller files are read faster than looked up
_SETTLED_NS = 5 * 10**9  # longer than any file system's resolution of times


def remembered_checksum(path: Path, memory: Path) -> str:
    """Returns `file_checksum(path)`, from `memory` where the file is certainly the one that was hashed.

    Args:
      path: a file.
      memory: the directory that remembers; made when needed, done without where it cannot be written.
    """
    before = _state(path)
    if before["bytes"] < _LEAST_BYTES:
        return file_checksum(path)
    note = Path(memory) / f"{xxhash.xxh3_64_hexdigest(os.fsencode(path.resolve()))}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["state"] == before and len(kept["xxh3"]) == 32:
            return kept["xxh3"]
    found = file_checksum(path)
    settled = time.time_ns() - max(before["modified_ns"], before["changed_ns"]) > _SETTLED_NS
    if settled and _state(path) == before:
        with contextlib.suppress(OSError):
            write_json(note, {"path": str(path.resolve()), "state": before, "xxh3": found})
    return found


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "bytes": found.st_size,
        "modified_ns": found.st_mtime_ns,
        "changed_ns": found.st_ctime_ns,  # no program sets it
        "inode": found.st_ino,
        "device": found.st_dev,
    }
