"""The distribution store: one self-describing record per document, in array_record shards.

A record is a JSON header and named arrays, followed by an xxh3 checksum of both; nothing in it is executable.
Shards hold a fixed number of documents, are written to a temporary name and renamed when complete, so a killed
writer loses at most one shard and a rerun yields the same bytes. The manifest (last) closes the artefact.

Deliberately not here yet: the 24-bit compressed entry of the byte-exact specification. It changes `pack_record`
and `unpack_record` only; readers see the same arrays.
"""

__all__ = ["Record", "RecordReader", "RecordWriter", "pack_record", "unpack_record"]

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, Manifest, fingerprint_of, read_manifest, write_json, write_manifest

_MAGIC = b"FJR1"
_SUFFIX = ".array_record"
_PLAN = "unfinished.json"
_DTYPES = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float16", "float32", "float64"}


class Record(NamedTuple):
    """The arrays of one document."""

    doc_id: str
    header: dict[str, Any]  # JSON scalars: n_bytes, nll_nats, ...
    arrays: dict[str, np.ndarray]


def pack_record(record: Record) -> bytes:
    """Returns the bytes of a record: magic, header length, JSON header, arrays, xxh3-64 of all before."""
    layout = {name: [str(array.dtype), list(array.shape)] for name, array in record.arrays.items()}
    unknown = sorted({dtype for dtype, _ in layout.values()} - _DTYPES)
    if unknown:
        raise ValueError(f"record {record.doc_id!r} has arrays of dtype {unknown}; the store keeps {sorted(_DTYPES)}")
    meta = {"doc_id": record.doc_id, "header": record.header, "arrays": layout}
    head = json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in record.arrays.values())
    data = _MAGIC + struct.pack("<I", len(head)) + head + body
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def unpack_record(data: bytes, *, where: str = "record") -> Record:
    """Reads the bytes of `pack_record`; `where` names the record in the error.

    Raises:
      InputError: the checksum, the magic or the layout does not fit.
    """
    if len(data) < 16 or data[:4] != _MAGIC:
        raise InputError(f"{where} is not a fusejax record; run `fusejax verify` and make the artefact again")
    if xxhash.xxh3_64_intdigest(data[:-8]) != struct.unpack("<Q", data[-8:])[0]:
        raise InputError(f"{where} is damaged: its checksum does not fit; delete the shard and run the stage again")
    (length,) = struct.unpack("<I", data[4:8])
    meta = json.loads(data[8 : 8 + length])
    arrays, start = {}, 8 + length
    for name, (dtype, shape) in meta["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return Record(meta["doc_id"], meta["header"], arrays)


def _shard_name(index: int) -> str:
    return f"records-{index:05d}{_SUFFIX}"


class RecordWriter:
    """Writes records in order; continues where an earlier run with the same settings stopped.

    `resume_at` is the number of records already kept: the caller goes on from there. Nothing is an artefact
    until `finish` has written the manifest.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kind: str,
        settings: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        shard_size: int = 256,
    ):
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}, expected at least 1")
        self.directory, self.kind, self.shard_size = Path(directory), kind, shard_size
        self.settings, self.parents = dict(settings), dict(parents or {})
        plan = {"plan": fingerprint_of([kind, self.settings, self.parents, shard_size])}
        self._clear_unless(plan)
        self._shard = sum(1 for _ in self._complete_shards())
        self.resume_at = self._shard * shard_size
        self._pending: list[bytes] = []
        self.bytes_written = 0

    def _clear_unless(self, plan: dict[str, str]) -> None:
        path = self.directory / _PLAN
        if path.is_file() and json.loads(path.read_text()) == plan:
            for stray in self.directory.glob("*.tmp"):
                stray.unlink()
            return
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        write_json(path, plan)

    def _complete_shards(self) -> Iterator[Path]:
        index = 0
        while (path := self.directory / _shard_name(index)).is_file():
            yield path
            index += 1

    def write(self, record: Record) -> None:
        """Adds one record; every `shard_size` records a shard is put in place."""
        self._pending.append(pack_record(record))
        if len(self._pending) == self.shard_size:
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
        self._shard, self._pending = self._shard + 1, []

    def finish(self, *, facts: Mapping[str, Any] | None = None) -> Manifest:
        """Writes the last shard and the manifest; `facts` are counts and measurements."""
        self._flush()
        (self.directory / _PLAN).unlink()
        settings = self.settings | {"shard_size": self.shard_size}
        return write_manifest(
            self.directory, kind=self.kind, settings=settings, parents=self.parents, facts=dict(facts or {})
        )


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
        self._readers: list[Any] = [None] * len(names)
        self._ends = np.cumsum([self._open(i).num_records() for i in range(len(names))], dtype=np.int64)

    def _open(self, shard: int) -> Any:
        if self._readers[shard] is None:
            from array_record.python.array_record_module import ArrayRecordReader

            try:
                self._readers[shard] = ArrayRecordReader(str(self._paths[shard]), "readahead_buffer_size:0")
            except RuntimeError as error:
                raise InputError(f"{self._paths[shard]} cannot be read ({error}); make the artefact again") from error
        return self._readers[shard]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        where = f"record {within} of {self._paths[shard]}"
        try:
            (data,) = self._open(shard).read([within])
        except RuntimeError as error:
            raise InputError(f"{where} is damaged ({error}); delete the shard and run the stage again") from error
        return unpack_record(data, where=where)

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            yield self[index]
