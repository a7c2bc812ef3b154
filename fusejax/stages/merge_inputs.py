"""The inputs of one output tensor, brought to one shape and dtype while they are read.

Where vocabularies differ, rows are looked up by token, block by block (`fusejax.merging.vocabulary.align_rows`); where
dtypes differ, values are widened. Neither holds more than the piece that is asked for.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fusejax.io.stream_read import ModelTensors, StoredTensor, dtype_of
from fusejax.merging.plan import MergePlan, TensorMerge
from fusejax.merging.vocabulary import align_rows
from fusejax.stages.merge_scan import input_refs

__all__ = ["gathers_rows", "input_tensors", "read_tensor"]


def input_tensors(plan: MergePlan, models: Mapping[str, ModelTensors], step: TensorMerge) -> Sequence[StoredTensor]:
    """Returns the inputs of a tensor, the base first, all of one shape and dtype."""
    refs = input_refs(step)
    tensors: Sequence[StoredTensor] = [models[ref.model].tensors[ref.name] for ref in refs]
    if gathers_rows(plan, step):
        default = plan.default_model if plan.default_model in {ref.model for ref in refs} else None
        rows = {ref.model: plan.rows[ref.model] for ref in refs}
        gathered = _Gathered({ref.model: t for ref, t in zip(refs, tensors, strict=True)}, rows, default)
        tensors = [_Rows(gathered, ref.model, tensor) for ref, tensor in zip(refs, tensors, strict=True)]
    elif step.vocabulary and plan.rows:
        tensors = [_First(tensor, len(plan.tokens)) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return tensors
    wide = jnp.result_type(*(dtype_of(name) for name in dtypes)).name
    return [_Widened(tensor, wide) for tensor in tensors]


def gathers_rows(plan: MergePlan, step: TensorMerge) -> bool:
    """Returns whether a tensor's rows are looked up by token; the first rows in their order are read as they lie."""
    if not (step.vocabulary and plan.rows):
        return False
    return any(not np.array_equal(plan.rows[ref.model], np.arange(len(plan.tokens))) for ref in input_refs(step))


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """Reads a whole tensor."""
    loaded = tensor.load()
    array = np.empty(math.prod(tensor.shape), dtype_of(tensor.dtype))
    loaded.read_into(0, array.view(np.uint8))
    return array.reshape(tensor.shape)


class _First(NamedTuple):
    """The first rows of a tensor."""

    tensor: StoredTensor
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.tensor.shape[1:])

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def where(self) -> str:
        return self.tensor.where

    def load(self) -> StoredTensor:
        return _First(self.tensor.load(), self.count)

    def read_into(self, start: int, out: np.ndarray) -> None:
        self.tensor.read_into(start, out)


class _Widened(NamedTuple):
    """A tensor in another dtype that holds all of its values."""

    tensor: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def where(self) -> str:
        return self.tensor.where

    def load(self) -> StoredTensor:
        return _Widened(self.tensor.load(), self.dtype)

    def read_into(self, start: int, out: np.ndarray) -> None:
        wide = out.view(dtype_of(self.dtype))
        narrow = np.empty(len(wide), dtype_of(self.tensor.dtype))
        self.tensor.read_into(start, narrow.view(np.uint8))
        wide[:] = narrow


class _Gathered:
    """The rows of all models' embeddings, by token; keeps the block that was read last."""

    def __init__(self, tensors: Mapping[str, StoredTensor], rows: Mapping[str, np.ndarray], default: str | None):
        self.count = len(next(iter(rows.values())))
        self.width = math.prod(next(iter(tensors.values())).shape[1:])
        self._tensors = {model: tensor.load() for model, tensor in tensors.items()}
        self._rows, self._default = rows, default
        self._last: tuple[tuple[int, int], dict[str, np.ndarray]] = ((0, 0), {})

    def block(self, first: int, end: int) -> dict[str, np.ndarray]:
        """Returns rows `first` to `end` of every model, [end - first, width]."""
        if self._last[0] != (first, end):
            found, places = {}, {}
            for model, tensor in self._tensors.items():
                wanted = self._rows[model][first:end]
                own = np.unique(wanted[wanted >= 0])
                found[model] = self._read(tensor, own)
                places[model] = np.where(wanted >= 0, np.searchsorted(own, wanted), -1).astype(np.int32)
            self._last = (first, end), align_rows(found, places, default=self._default)
        return self._last[1]

    def _read(self, tensor: StoredTensor, rows: np.ndarray) -> np.ndarray:
        """Some rows, in ascending order; at least one, so that there is something to index."""
        out = np.zeros((max(len(rows), 1), self.width), dtype_of(tensor.dtype))
        for piece in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else ():
            target = out[piece[0] : piece[-1] + 1].reshape(-1)
            tensor.read_into(int(rows[piece[0]]) * self.width, target.view(np.uint8))
        return out


class _Rows(NamedTuple):
    """One model's part of `_Gathered`."""

    gathered: _Gathered
    model: str
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.gathered.count, *self.tensor.shape[1:])

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def where(self) -> str:
        return self.tensor.where

    def load(self) -> StoredTensor:
        return self

    def read_into(self, start: int, out: np.ndarray) -> None:
        values, width = out.view(dtype_of(self.dtype)), self.gathered.width
        first, end = start // width, -(-(start + len(values)) // width)
        block = self.gathered.block(first, end)[self.model].reshape(-1)
        values[:] = block[start - first * width : start - first * width + len(values)]
