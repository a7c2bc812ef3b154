"""Tensors of a model one piece at a time, by their Hugging Face names, wherever the model lies.

A safetensors file is a length, a JSON header and the bytes: the header is read once, and then any piece of any tensor
is one `pread` into a buffer of the caller's. Nothing is memory-mapped, so nothing that was read stays in the process.
A fusejax checkpoint holds stacked leaves in another layout; `fusejax.io.stream_checkpoint` gives its tensors in the
same form, so that whoever reads need not know which of the two it is.

Trusts nothing, as `fusejax.io.hf`: files lie in the directory itself, pickles are refused, and a header must describe
tensors that lie inside the file, one after another, before a byte of them is read.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from fusejax.errors import InputError
from fusejax.io.hf import _directory, _weight_files
from fusejax.io.manifest import fingerprint_of
from fusejax.io.progress import beat

__all__ = [
    "ArrayTensor",
    "ModelTensors",
    "StoredTensor",
    "dtype_code",
    "dtype_of",
    "equal_tensors",
    "open_tensors",
    "read_header",
]

_MAX_HEADER_BYTES = 100 * 2**20
_COMPARED = 2**18  # elements at a time
_CODES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def dtype_of(name: str) -> np.dtype:
    """Returns the dtype that numpy or ml_dtypes knows by this name."""
    return np.dtype(getattr(ml_dtypes, name, name))


def dtype_code(name: str) -> str:
    """Returns what a safetensors header calls a dtype."""
    for code, known in _CODES.items():
        if known == name:
            return code
    raise InputError(f"safetensors has no dtype {name}; known are {', '.join(_CODES.values())}")


class StoredTensor(Protocol):
    """A tensor that is read in pieces."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...

    @property
    def dtype(self) -> str:
        """The name of the dtype."""
        ...

    @property
    def where(self) -> str:
        """The file, for messages."""
        ...

    def load(self) -> "StoredTensor":
        """Returns the tensor ready for `read_into`; what it holds is freed with it."""
        ...

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills `out`, [n] of this dtype (or its bytes), with the elements from flat index `start` on."""
        ...


class ArrayTensor(NamedTuple):
    """A tensor that is in memory."""

    array: np.ndarray  # contiguous
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def dtype(self) -> str:
        """The array's dtype, by name."""
        return self.array.dtype.name

    def load(self) -> StoredTensor:
        """Returns itself."""
        return self

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Copies a piece of the array."""
        size = out.nbytes // self.array.dtype.itemsize
        out.view(self.array.dtype)[:] = self.array.reshape(-1)[start : start + size]


class FileTensor(NamedTuple):
    """A tensor in a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
    where: str
    descriptor: int
    offset: int  # of the first byte in the file

    def load(self) -> StoredTensor:
        """Returns itself: pieces are read from the file."""
        return self

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Reads a piece from the file."""
        view = out.reshape(-1).view(np.uint8).data
        place = self.offset + start * dtype_of(self.dtype).itemsize
        while view:
            got = os.preadv(self.descriptor, [view], place)
            if got == 0:
                raise InputError(f"{self.where} ended while it was read: was it replaced meanwhile? Start again")
            view, place = view[got:], place + got
            beat()


class ModelTensors:
    """The tensors of one model; use it as a context manager."""

    def __init__(self, directory: Path, tensors: dict[str, StoredTensor], descriptors: list[int], identity: Any):
        self.directory = directory
        self.tensors = tensors
        self.identity = fingerprint_of(identity)  # changes when a file is touched; for resuming
        self._descriptors = descriptors

    def __enter__(self) -> "ModelTensors":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def equal_tensors(one: ModelTensors, other: ModelTensors) -> bool:
    """Returns whether two models hold the same tensors bit by bit; reads up to the first difference."""
    if {n: (t.shape, t.dtype) for n, t in one.tensors.items()} != {
        n: (t.shape, t.dtype) for n, t in other.tensors.items()
    }:
        return False
    return all(_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def open_tensors(directory: str | os.PathLike[str], *, scratch: Path | None = None) -> ModelTensors:
    """Opens a Hugging Face directory or a fusejax checkpoint.

    Args:
        directory: of the model.
        scratch: where a checkpoint is unpacked; on a disk with room for it. None: the system's choice.

    Raises:
        InputError: no model there, pickled weights, a path out of the directory, a damaged or truncated file.
    """
    root = _directory(directory)
    if (root / "params").is_dir() and (root / "checksums.json").is_file():  # of fusejax.io.checkpoint
        from fusejax.io.stream_checkpoint import open_leaves

        return ModelTensors(root, *open_leaves(root, scratch))
    tensors: dict[str, StoredTensor] = {}
    descriptors: list[int] = []
    identity = []
    try:
        for path in _weight_files(root):
            descriptor = os.open(path, os.O_RDONLY)
            descriptors.append(descriptor)
            header, begin = read_header(path)
            facts = path.stat()
            identity.append([path.name, facts.st_size, facts.st_mtime_ns, fingerprint_of(header)])
            for name, entry in header.items():
                if name in tensors:
                    raise InputError(f"{path}: {name} is also in {tensors[name].where}; keep one of the two")
                shape, dtype = tuple(entry["shape"]), _CODES[entry["dtype"]]
                tensors[name] = FileTensor(shape, dtype, str(path), descriptor, begin + entry["data_offsets"][0])
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return ModelTensors(root, tensors, descriptors, identity)


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Reads and checks the header of a safetensors file.

    Returns:
        Name -> {"dtype", "shape", "data_offsets"}, and the position of the first tensor byte.

    Raises:
        InputError: the header is no header, or describes bytes that are not in the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path} is truncated or no safetensors file; fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path} has no valid header ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} has no valid header (no mapping); fetch it again")
    header.pop("__metadata__", None)
    begin = 8 + length
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: _first_offset(path, *item)):
        expected = _check_entry(path, name, entry, expected)
    if begin + expected != size:
        raise InputError(f"{path} has {size} bytes, its header describes {begin + expected}; fetch it again")
    return header, begin


def _first_offset(path: Path, name: str, entry: Any) -> int:
    try:
        first, last = entry["data_offsets"]
        numbers = [first, last, *entry["shape"]]
        if entry["dtype"] in _CODES and all(type(number) is int and number >= 0 for number in numbers):
            return first
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{path}: the entry of {name} in the header is damaged or of an unknown dtype: {entry!r}")


def _check_entry(path: Path, name: str, entry: Mapping[str, Any], expected: int) -> int:
    """Returns where the tensor ends; tensors lie one after another without gap or overlap."""
    first, last = entry["data_offsets"]
    size = math.prod(entry["shape"]) * dtype_of(_CODES[entry["dtype"]]).itemsize
    if first != expected or last - first != size:
        raise InputError(
            f"{path}: {name} lies at bytes {first} to {last}, expected {expected} to {expected + size}; fetch it again"
        )
    return last


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    one, other = one.load(), other.load()
    width, total = dtype_of(one.dtype).itemsize, math.prod(one.shape)
    for start in range(0, total, _COMPARED):
        pieces = [np.empty(min(_COMPARED, total - start) * width, np.uint8) for _ in range(2)]
        one.read_into(start, pieces[0])
        other.read_into(start, pieces[1])
        if not np.array_equal(pieces[0], pieces[1]):
            return False
    return True
