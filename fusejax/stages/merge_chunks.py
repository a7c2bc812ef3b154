"""The same matrix of several models, read side by side in chunks that stay in the processor's cache.

A chunk has one row per model and a fixed number of elements, so that a program is compiled once for all of them; the
last is filled up with zeros. Methods that compare the elements of a matrix's rows get chunks of whole rows.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fusejax.io.stream_read import StoredTensor

__all__ = ["CHUNK", "RAW_DTYPES", "Chunks", "nonfinite", "on_host"]

CHUNK = 2**18  # elements; what is read and made of them stays in the cache, calls of programs cost little
RAW_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # bits; larger ones are NaN


class Chunks:
    """One matrix of R models.

    Args:
        tensors: R tensors of one shape and dtype (bfloat16, float16 or float32).
        row: a chunk holds whole rows of this many elements; 1 where rows do not matter.
    """

    def __init__(self, tensors: Sequence[StoredTensor], *, row: int = 1):
        self.tensors = [tensor.load() for tensor in tensors]
        self.dtype = tensors[0].dtype
        self.size = math.prod(tensors[0].shape)
        self.row = max(row, 1)
        self.length = self.row * max(CHUNK // self.row, 1)
        self.buffer = _aligned((len(tensors), self.length), RAW_DTYPES[self.dtype])  # what `fill` filled

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (start, count, raw [R, length]), padded with zeros; the buffer is reused."""
        for start in range(0, self.size, self.length):
            yield start, self.fill(start), self.buffer

    def fill(self, start: int) -> int:
        """Reads the chunk at `start` into the buffer; returns how many elements it has."""
        count = min(self.length, self.size - start)
        for row, tensor in enumerate(self.tensors):
            tensor.read_into(start, self.buffer[row, :count])
        self.buffer[:, count:] = 0
        return count


def nonfinite(values: np.ndarray, dtype: str) -> bool:
    """Returns whether an array in the raw form of `dtype` holds NaN or infinity; two reductions, no temporary."""
    if values.size == 0:
        return False
    width = values.dtype.itemsize * 8
    infinity = _INFINITY[dtype]
    signed, unsigned = values.view(f"i{width // 8}"), values.view(f"u{width // 8}")
    return int(signed.max()) >= infinity or int(unsigned.max()) >= infinity + (1 << (width - 1))


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Computes on the host, where there is an accelerator too: chunks are not worth a transfer. For this thread."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the host out
        return contextlib.nullcontext()


def _aligned(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """An array at a multiple of 64 bytes, which XLA takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)
