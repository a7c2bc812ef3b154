"""The distribution store: one self-describing record per document, in array_record shards.

`fusejax.io.store_record` says what a record is. Shards hold a fixed number of documents, are written to a temporary
name and renamed when complete, so a killed writer loses at most one shard and a rerun yields the same bytes. Beside
them lies `lengths.npy`, the positions of every document. The manifest (last) closes the artefact.

Deliberately not here: compression of whole shards, which would cost random access its speed.
"""

__all__ = [
    "Record",
    "RecordReader",
    "RecordWriter",
    "damaged_records",
    "pack_record",
    "reopen",
    "shard_index",
    "unfinished_here",
    "unpack_record",
]

import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, Manifest, fingerprint_of, read_manifest, write_json, write_manifest
from fusejax.io.progress import beat
from fusejax.io.store_record import RECORD_FORMAT, Record, pack_record, record_length, unpack_record

_SUFFIX = ".array_record"
_PLAN = "unfinished.json"
_LENGTHS = "lengths.npy"
_OPEN_SHARDS = 64


def _shard_name(index: int) -> str:
    return f"records-{index:05d}{_SUFFIX}"


def shard_index(name: str) -> int | None:
    """Returns the number of a shard, or None where `name` is that of another file."""
    found = re.fullmatch(r"records-(\d+)" + re.escape(_SUFFIX), name)
    return int(found[1]) if found else None


class RecordWriter:
    """Writes records in order; continues where an earlier run with the same settings stopped.

    `resume_at` is the number of records that are kept without a gap: the caller goes on from there, or asks `has`
    for each shard and moves with `seek`. Nothing is an artefact until `finish` has written the manifest.

    Args:
      directory: of the artefact.
      kind, settings, parents: its identity, see `fusejax.io.manifest`.
      shard_size: records per shard.
      codec: see `pack_record`; it belongs into `settings` where it is a choice.
      joining: another process has opened the same artefact, and clears it away where it is another's.

    Raises:
      InputError: joining an artefact of another identity.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kind: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        shard_size: int = 256,
        codec: str | None = None,
        joining: bool = False,
    ):
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, expected at least 1")
        self.directory, self.kind, self.shard_size, self.codec = Path(directory), kind, shard_size, codec
        self.settings, self.parents = dict(settings), dict(parents or {})
        plan = _plan(kind, self.settings, self.parents, shard_size)
        self._check_same(plan) if joining else self._clear_unless(plan)
        self._shard = 0
        while self.has(self._shard):
            self._shard += 1
        self.resume_at = self._shard * shard_size
        self._pending: list[bytes] = []
        self._lengths: dict[int, list[int]] = {}  # of the shards written here
        self.bytes_written = 0

    def _check_same(self, plan: dict[str, str]) -> None:
        if _read_plan(self.directory / _PLAN) != plan:
            raise InputError(
                f"{self.directory} was opened by another process with other settings or inputs; start all processes "
                "with the same configuration, the same version and a file system that they share"
            )

    def _clear_unless(self, plan: dict[str, str]) -> None:
        path = self.directory / _PLAN
        if path.is_file() and _read_plan(path) == plan:
            for stray in self.directory.glob("*.tmp"):
                stray.unlink()
            return
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        write_json(path, plan)

    def has(self, shard: int) -> bool:
        """Returns whether a shard is already in place."""
        return (self.directory / _shard_name(shard)).is_file()

    def seek(self, shard: int) -> None:
        """Makes the next record the first of a shard."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} records of shard {self._shard} are not written yet")
        self._shard = shard

    def write(self, record: Record) -> None:
        """Adds one record; every `shard_size` records a shard is put in place."""
        self._pending.append(pack_record(record, codec=self.codec))
        if len(self._pending) == self.shard_size:
            self._flush()

    def flush(self) -> None:
        """Puts a shard in place that has fewer records than the others: the last one."""
        self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        from array_record.python.array_record_module import ArrayRecordWriter

        final = self.directory / _shard_name(self._shard)
        temporary = final.with_suffix(".tmp")
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for data in self._pending:
                writer.write(data)
            writer.close()
        except RuntimeError as error:  # the library's only exception; its text holds the system's message
            temporary.unlink(missing_ok=True)
            full = os.strerror(errno.ENOSPC) in str(error)
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(temporary)) from error
        os.replace(temporary, final)
        self.bytes_written += sum(map(len, self._pending))
        self._lengths[self._shard] = [record_length(data) for data in self._pending]
        self._shard, self._pending = self._shard + 1, []

    def finish(self, *, facts: Mapping[str, Any] | None = None) -> Manifest:
        """Writes the last shard, the lengths and the manifest; `facts` are counts and measurements.

        Raises:
          InputError: a shard of an earlier run cannot be read.
        """
        self._flush()
        lengths, counts, shard = [], {}, 0
        while self.has(shard):
            found = self._lengths.get(shard)
            if found is None:  # made by an earlier run
                path = self.directory / _shard_name(shard)
                reader = _open_shard(path)
                found = [record_length(reader.read([i])[0]) for i in range(reader.num_records())]
                reader.close()
            counts[_shard_name(shard)] = len(found)
            lengths += found
            shard += 1
        temporary = self.directory / f".{_LENGTHS}.tmp"
        with open(temporary, "wb") as file:
            np.save(file, np.asarray(lengths, np.int32), allow_pickle=False)
        os.replace(temporary, self.directory / _LENGTHS)
        (self.directory / _PLAN).unlink()
        size = sum((self.directory / name).stat().st_size for name in counts)
        measured = {"positions": sum(lengths), "bytes_per_position": size / max(sum(lengths), 1)}
        return write_manifest(
            self.directory,
            kind=self.kind,
            settings=self.settings | {"shard_size": self.shard_size},
            parents=self.parents,
            facts=measured | dict(facts or {}),
            counts=counts,
        )


def _plan(kind: str, settings: Mapping[str, Any], parents: Mapping[str, str] | None, shard_size: int) -> dict[str, str]:
    identity = [kind, dict(settings), dict(parents or {}), shard_size, RECORD_FORMAT]  # no shard of two formats
    return {"plan": fingerprint_of(identity)}


def reopen(
    directory: Path, *, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str], shard_size: int
) -> None:
    """Makes a finished artefact an unfinished one, to which a `RecordWriter` of this identity adds what is missing."""
    write_json(directory / _PLAN, _plan(kind, settings, parents, shard_size))
    for name in (MANIFEST, _LENGTHS):
        (directory / name).unlink(missing_ok=True)


def unfinished_here(directory: Path) -> bool:
    """Returns whether an artefact is being made in a directory."""
    return (directory / _PLAN).is_file()


def _read_plan(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _open_shard(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return ArrayRecordReader(str(path), "readahead_buffer_size:0")
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read ({error}); make the artefact again") from error


def damaged_records(path: Path) -> list[int] | None:
    """Returns the records of a shard that do not pass their checksum; None: the file itself cannot be read."""
    try:
        reader = _open_shard(path)
        count = reader.num_records()
    except (InputError, RuntimeError):
        return None
    if not count:  # no shard is empty: the library reads a broken file so
        return None
    bad = []
    for index in range(count):
        try:
            unpack_record(reader.read([index])[0])
        except (InputError, RuntimeError):
            bad.append(index)
    reader.close()
    return bad


class RecordReader:
    """Random access to the records of a finished artefact: `len(reader)`, `reader[i]`, iteration."""

    def __init__(self, directory: Path, *, kind: str | None = None):
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory, kind=kind)
        names = sorted(name for name in self.manifest.files if name.endswith(_SUFFIX))
        for name in names:
            expected = self.manifest.files[name]["bytes"]
            path = self.directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                raise InputError(f"{path} has {found} bytes, {MANIFEST} says {expected}; make the artefact again")
        self._paths = [self.directory / name for name in names]
        # A corpus may have thousands of shards, a process may not open as many files.
        self._open = functools.lru_cache(maxsize=_OPEN_SHARDS)(lambda shard: _open_shard(self._paths[shard]))
        self._ends = self._count_records()

    def _count_records(self) -> np.ndarray:
        """Records up to the end of each shard: all but the last are full, so only that one is opened."""
        counts = np.full(len(self._paths), self.manifest.settings["shard_size"], np.int64)
        if len(counts):
            counts[-1] = self._open(len(counts) - 1).num_records()
        return np.cumsum(counts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[records] int64, positions of every document, without decoding any."""
        if _LENGTHS in self.manifest.files:
            with open(self.directory / _LENGTHS, "rb") as file:
                return np.load(file, allow_pickle=False).astype(np.int64)
        return np.array([record_length(self._data(i)[0]) for i in range(len(self))], np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        data, where = self._data(index)
        beat()
        return unpack_record(data, where=where)

    def _data(self, index: int) -> tuple[bytes, str]:
        """The bytes of a record, and its name for messages."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        where = f"record {within} of {self._paths[shard]}"
        try:
            (data,) = self._open(shard).read([within])
        except RuntimeError as error:
            raise InputError(f"{where} is damaged ({error}); delete the shard and run the stage again") from error
        return data, where

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            yield self[index]
