"""The tensors of a fusejax checkpoint under their Hugging Face names, a few chunks in memory at a time.

A checkpoint holds stacked leaves, compressed, in our layout: a piece of one matrix cannot be read without decoding the
chunks that it lies in. So when its first tensor is asked for, a checkpoint is unpacked into unnamed files: leaf by
leaf, each compared with its checksum, then tensor by tensor in the Hugging Face layout. From there on pieces are read
like those of any other model. It costs two more writes of the model to the disk, and memory for a row of chunks (a
whole leaf, where others wrote it in one). (Leaves are read by TensorStore, which Orbax writes by: Orbax itself
restores trees.)
"""

import json
import math
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from fusejax.errors import InputError
from fusejax.io.checkpoint import CHECKSUMS, tree_checksums
from fusejax.io.hf import _hf_tensors, read_hf_config
from fusejax.io.stream_read import FileTensor, StoredTensor, dtype_of
from fusejax.models.config import ModelConfig
from fusejax.models.params import param_table

__all__ = ["LeafTensor", "open_leaves"]


def open_leaves(directory: Path, scratch: Path | None = None) -> tuple[dict[str, StoredTensor], list[int], Any]:
    """Opens a checkpoint without reading its weights.

    Args:
        directory: a model directory.
        scratch: where the unnamed files are made; on a disk with room for the model. None: the system's choice.

    Returns:
        Tensors by Hugging Face name, the file descriptors to close, and what changes when the files do.

    Raises:
        InputError: leaves that do not fit the configuration.
    """
    config = read_hf_config(directory)
    table = param_table(config)
    saved = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))["leaves"]
    if wrong := [
        path
        for path in {*table, *saved}
        if path not in saved or path not in table or tuple(saved[path]["shape"]) != table[path].shape
    ]:
        raise InputError(f"{directory}: the leaves {sorted(wrong)} do not fit its config.json; restore it from a copy")
    with tempfile.TemporaryFile(dir=scratch) as file:
        descriptor = os.dup(file.fileno())
    spool = _Spool(directory, config, saved, descriptor, scratch)
    tensors: dict[str, StoredTensor] = {}
    offset = 0
    for path, spec in table.items():
        dtype, where = saved[path]["dtype"], f"{directory}/params ({path})"
        for name in spec.hf_names():
            if name not in tensors:
                place = FileTensor(spec.hf_shape, dtype, where, descriptor, offset)
                tensors[name] = LeafTensor(spec.hf_shape, dtype, where, spool, place)
                spool.offsets[name] = offset
                offset += math.prod(spec.hf_shape) * dtype_of(dtype).itemsize
    return tensors, [descriptor], saved


class LeafTensor(NamedTuple):
    """A tensor of a checkpoint, in the Hugging Face layout."""

    shape: tuple[int, ...]
    dtype: str
    where: str
    spool: "_Spool"
    place: FileTensor

    def load(self) -> StoredTensor:
        """Returns the tensor's place in the unnamed file, after the checkpoint was unpacked."""
        self.spool.fill()
        return self.place

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Reads a piece."""
        self.load().read_into(start, out)


class _Spool:
    """The unnamed file of a checkpoint; filled once."""

    def __init__(
        self, directory: Path, config: ModelConfig, saved: Mapping[str, Any], descriptor: int, scratch: Path | None
    ):
        self.offsets: dict[str, int] = {}
        self._directory, self._config, self._saved = directory, config, saved
        self._descriptor, self._scratch = descriptor, scratch
        self._lock, self._done = threading.Lock(), False

    def fill(self) -> None:
        """Unpacks the checkpoint, at the first call."""
        with self._lock:
            if self._done:
                return
            with tempfile.TemporaryFile(dir=self._scratch) as file:
                leaves = {path: self._unpack(path, file) for path in self._saved}
                for name, tensor in _hf_tensors(self._config, leaves):
                    _write(self._descriptor, tensor, self.offsets[name])
            self._done = True

    def _unpack(self, path: str, file: Any) -> np.ndarray:
        """Writes one leaf to the end of a file and returns it mapped, so that it takes no memory of its own."""
        shape, dtype = tuple(self._saved[path]["shape"]), dtype_of(self._saved[path]["dtype"])
        start = -(-os.fstat(file.fileno()).st_size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        place, size = start, math.prod(shape) * dtype.itemsize
        for part in self._parts(path):
            _write(file.fileno(), np.ascontiguousarray(part), place)
            place += part.nbytes
        mapped = mmap.mmap(file.fileno(), size, offset=start, prot=mmap.PROT_READ)
        leaf = np.frombuffer(mapped, dtype).reshape(shape)
        if tree_checksums({path: leaf}) != {path: self._saved[path]["checksum"]}:
            raise InputError(f"{self._directory}: {path} is damaged; restore it from a copy")
        return leaf

    def _parts(self, path: str) -> Iterator[np.ndarray]:
        """Yields a leaf along its first axis, in pieces of whole chunks: what is decoded at once anyway."""
        base = f"file://{(self._directory / 'params').absolute()}"
        store = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
        try:
            opened = ts.open({"driver": "zarr", "kvstore": store}, open=True).result()
            if not opened.shape:
                yield opened.read().result()
                return
            step = int((opened.chunk_layout.read_chunk.shape or (0,))[0] or opened.shape[0])
            for start in range(0, opened.shape[0], step):
                yield opened[start : start + step].read().result()
        except (ValueError, OSError) as error:
            reason = str(error).split("\n")[0][:300]
            raise InputError(f"{self._directory}: {path} cannot be read ({reason}); restore it") from error


def _write(descriptor: int, array: np.ndarray, place: int) -> None:
    view = array.reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
