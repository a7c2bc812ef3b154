"""Safetensors files written piece by piece, in any order, and a merge of hours that survives a kill.

The header is known before the first value: names, shapes and dtypes. So the files are made at their full size, and any
piece of any tensor is one `pwrite` at its place, from any thread. `Staging` is the directory in which that happens,
beside its final place and renamed at the end. It keeps a journal, one line per finished tensor with the checksum of
what was written; after a kill the same work finds it, believes what still has its checksum, and goes on.

Work of other inputs or settings (another `identity`) is never continued but removed. Two processes cannot work in
one staging directory: the second is refused.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.hf import INDEX, SINGLE
from fusejax.io.manifest import write_json
from fusejax.io.stream_read import dtype_code, dtype_of

__all__ = ["Staging", "TensorWriter", "open_staging", "refuse_occupied", "staging_of"]

_BLOCK = 2**22


class TensorWriter:
    """Safetensors files of known content; tensors are laid out in the given order.

    Args:
        directory: holds the files, made anew or kept where they have the right size.
        specs: name -> (shape, dtype name).
        max_shard_bytes: files are split beyond this size (or one tensor).
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, tuple[tuple[int, ...], str]], *, max_shard_bytes: int = 5 * 10**9
    ):
        self.total = sum(_size(*spec) for spec in specs.values())
        self._directory = directory
        self._place: dict[str, tuple[int, int, int]] = {}  # name -> descriptor, offset, bytes
        self._descriptors: list[int] = []
        shards = _split(specs, max_shard_bytes)
        self.files = [
            SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            for i in range(len(shards))
        ]
        self._file_of = {name: file for file, names in zip(self.files, shards, strict=True) for name in names}
        for file, names in zip(self.files, shards, strict=True):
            self._make(directory / file, {name: specs[name] for name in names})

    def _make(self, path: Path, specs: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in specs.items():
            end = offset + _size(shape, dtype)
            header[name] = {"dtype": dtype_code(dtype), "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)  # tensors begin at a multiple of 64 bytes
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(descriptor)
        begin = 8 + len(text)
        if os.fstat(descriptor).st_size != begin + offset:
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(NotImplementedError):  # a full disk is found out now, not after hours
                os.posix_fallocate(descriptor, 0, max(begin + offset, 1))
            os.ftruncate(descriptor, begin + offset)
        _pwrite(descriptor, struct.pack("<Q", len(text)) + text, 0)
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                self._place[name] = descriptor, begin + first, last - first

    def size(self, name: str) -> int:
        """Returns the bytes of a tensor."""
        return self._place[name][2]

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes a contiguous piece of a tensor at byte `start` of it; safe from several threads."""
        descriptor, offset, size = self._place[name]
        if start < 0 or start + values.nbytes > size:
            raise ValueError(f"{name} has {size} bytes, got a piece at {start} to {start + values.nbytes}")
        _pwrite(descriptor, values.reshape(-1).view(np.uint8).data, offset + start)

    def checksum(self, name: str) -> str:
        """Returns the xxh3 of a tensor's bytes as they lie in the file."""
        descriptor, offset, size = self._place[name]
        digest, block = xxhash.xxh3_64(), bytearray(min(_BLOCK, size))
        for start in range(0, size, _BLOCK):
            view = memoryview(block)[: min(_BLOCK, size - start)]
            os.preadv(descriptor, [view], offset + start)
            digest.update(view)
        return digest.hexdigest()

    def finish(self) -> None:
        """Writes the index where there are several files, and closes them."""
        if len(self.files) > 1:
            write_json(
                self._directory / INDEX, {"metadata": {"total_size": self.total}, "weight_map": dict(self._file_of)}
            )
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class Staging:
    """A directory in the making, and the journal of what is finished in it; made by `open_staging`."""

    JOURNAL = ".journal"

    def __init__(self, directory: Path, finished: dict[str, dict[str, Any]]):
        self.directory = directory
        self.finished = finished  # tensor -> what was said about it
        self._lock = threading.Lock()
        self._journal = open(directory / self.JOURNAL, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`

    def mark(self, name: str, **facts: Any) -> None:
        """Writes down that a tensor is finished; facts are JSON, `xxh3` among them."""
        with self._lock:
            self.finished[name] = facts
            self._journal.write(json.dumps({"name": name, **facts}) + "\n")
            self._journal.flush()

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()


def staging_of(final: Path) -> Path:
    """Returns the directory in which `final` is made."""
    return final.with_name(f".{final.name}.merging")


def refuse_occupied(final: Path) -> None:
    """Raises InputError where there is something at `final` but an empty directory."""
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise InputError(f"{final} exists and is not an empty directory; choose another --out or remove it")


@contextlib.contextmanager
def open_staging(final: Path, identity: str) -> Iterator[Staging]:
    """Yields the staging directory of `final`, which becomes `final` when the block ends without an error.

    An `InputError` removes it: the same input would fail again. Any other end, a kill among them, keeps it for the
    next call with the same identity.

    Args:
        final: absent, or an empty directory.
        identity: a hash of everything that determines the content.

    Raises:
        InputError: `final` is not empty, or another process is at work in the staging directory.
    """
    refuse_occupied(final)
    directory = staging_of(final)
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another merge is writing {final}; wait for it, or choose another --out") from None
        staging = Staging(directory, _resume(directory, identity))
        try:
            yield staging
        except InputError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        finally:
            staging.close()
        (directory / Staging.JOURNAL).unlink()
        (directory / ".identity").unlink()
        os.replace(directory, final)
    finally:
        os.close(descriptor)


def _resume(directory: Path, identity: str) -> dict[str, dict[str, Any]]:
    """Empties the directory unless it holds the same work; returns what the journal says is finished."""
    mark = directory / ".identity"
    if not mark.is_file() or mark.read_text() != identity:
        for entry in directory.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        mark.write_text(identity)
        return {}
    finished = {}
    with contextlib.suppress(FileNotFoundError), open(directory / Staging.JOURNAL, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # the last line may be cut
                entry = json.loads(line)
                finished[entry.pop("name")] = entry
    return finished


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * dtype_of(dtype).itemsize


def _split(specs: Mapping[str, tuple[tuple[int, ...], str]], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = _size(*spec)
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _pwrite(descriptor: int, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
