"""The common merge methods over matrices that are read in chunks: statistics in one pass or two, then the result.

The functions of `fusejax.merging` want a whole matrix. For the methods here that is not needed: what depends on the
whole matrix is a handful of numbers (sums of squares, a threshold, the index up to which ties count), gathered over
chunks that stay in the processor's cache; with these given, every element is on its own. `prepare` gathers them, and
what it returns makes the chunks of the result: float32 in between, one rounding at the end, as in `fusejax.merging`,
whose functions are called themselves where they are elementwise. Sums are kept in float64 over the chunks.

Selection is exact. A histogram of the upper 16 bits of the values (non-negative floats are ordered as their bits)
finds the bin of the k-th largest, a second pass gathers that bin, and of equal elements at the threshold the lowest
flat indices are kept. The flat index is that of the tensor as it is stored.

Not here: everything else, which `fusejax.merging.merge_leaf` does on whole matrices.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from fusejax.io.stream_read import StoredTensor
from fusejax.merging import MERGE_METHODS
from fusejax.stages import merge_programs as programs

__all__ = ["CHUNK", "RAW_DTYPES", "Chunks", "Prepared", "energies", "is_chunked", "nonfinite", "prepare"]

CHUNK = 2**17  # elements; a row of each input, the temporaries and the result stay in the L2 cache
_ELEMENTWISE = ("linear", "task_arithmetic", "nearswap", "passthrough")
_STREAMED = (*_ELEMENTWISE, "sce", "varm", "ties", "slerp")
RAW_DTYPES = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # bits; larger ones are NaN
_NEARLY_PARALLEL = 0.9995


class Prepared(NamedTuple):
    """A merge of one matrix whose statistics are known."""

    formula: Callable[..., jax.Array]  # (rows [R, C] float32, *numbers, **options) -> [C] float32
    numbers: Callable[[int, int], tuple[Any, ...]]  # of the chunk at `start` with `count` elements
    options: tuple[tuple[str, Any], ...] = ()
    coefficients: tuple[float, ...] | None = None

    def __call__(self, raw: np.ndarray, start: int, count: int, dtype: str) -> np.ndarray:
        """Returns a chunk of the result, [count] in the raw form of `dtype`."""
        made = programs.run_formula(
            raw, self.numbers(start, count), formula=self.formula, options=self.options, dtype=dtype
        )
        return np.asarray(made)[:count]


class Chunks:
    """The same matrix of several models, read side by side.

    Args:
        tensors: R tensors of one shape and dtype (bfloat16, float16 or float32).
    """

    def __init__(self, tensors: Sequence[StoredTensor]):
        self.tensors = [tensor.load() for tensor in tensors]
        self.dtype = tensors[0].dtype
        self.size = math.prod(tensors[0].shape)
        self.digests: list[str] | None = None  # xxh3 of every tensor, once all was read
        self.bad: list[int] = []  # rows with NaN or infinity, as far as was read
        self._buffer = _aligned((len(tensors), CHUNK), RAW_DTYPES[self.dtype])

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (start, count, raw [R, CHUNK]), padded with zeros; the buffer is reused."""
        first = self.digests is None
        hashes = [xxhash.xxh3_64() for _ in self.tensors]
        for start in range(0, self.size, CHUNK):
            count = self.fill(start)
            for row, digest in enumerate(hashes if first else ()):
                values = self._buffer[row, :count]
                digest.update(values.data)
                if row not in self.bad and nonfinite(values, self.dtype):
                    self.bad.append(row)
            yield start, count, self._buffer
        self.digests = [digest.hexdigest() for digest in hashes] if first else self.digests

    def fill(self, start: int) -> int:
        """Reads the chunk at `start` into the buffer; returns how many elements it has."""
        count = min(CHUNK, self.size - start)
        for row, tensor in enumerate(self.tensors):
            tensor.read_into(start, self._buffer[row, :count])
        self._buffer[:, count:] = 0
        return count

    @property
    def buffer(self) -> np.ndarray:
        """What `fill` filled."""
        return self._buffer


def nonfinite(values: np.ndarray, dtype: str) -> bool:
    """Returns whether an array in the raw form of `dtype` holds NaN or infinity; two reductions, no temporary."""
    if values.size == 0:
        return False
    width = values.dtype.itemsize * 8
    infinity = _INFINITY[dtype]
    signed, unsigned = values.view(f"i{width // 8}"), values.view(f"u{width // 8}")
    return int(signed.max()) >= infinity or int(unsigned.max()) >= infinity + (1 << (width - 1))


def is_chunked(method: str, parameters: Mapping[str, Any], dtypes: Sequence[str]) -> bool:
    """Returns whether `prepare` knows a method with these parameters and dtypes (of inputs and output)."""
    if method not in _STREAMED or any(dtype not in RAW_DTYPES for dtype in dtypes):
        return False
    if method == "varm":
        return parameters.get("granularity", "matrix") != "parameter"
    return not (method == "ties" and parameters.get("rescale"))


def prepare(method: str, chunks: Chunks, values: Mapping[str, Any], energy: np.ndarray | None = None) -> Prepared:
    """Gathers what a method needs to know of a whole matrix.

    Args:
        method: one that `is_chunked`.
        chunks: row 0 is the base where the method takes one, then the targets.
        values: the parameters, complete, as `fusejax.merging.registry.resolve` gives them.
        energy: [J] for `varm` over units wider than the matrix.

    Raises:
        OverflowError: squared changes that are not finite, as those of `chunks.bad`.
    """
    if method in _ELEMENTWISE:
        return _prepare_elementwise(method, chunks, values)
    if method == "slerp":
        return _prepare_slerp(chunks, float(values["t"]))
    if method == "ties":
        return _prepare_ties(chunks, values)
    if len(chunks.tensors) == 2 and (method == "varm" or values["variant"] == "fuseai" or values["select_topk"] >= 1):
        return Prepared(programs.second_row, lambda start, count: (), (), (1.0,))
    if method == "varm":
        return _prepare_varm(chunks, energies(chunks) if energy is None else energy)
    return _prepare_sce(chunks, values)


def energies(chunks: Chunks, selected: "_Selection | None" = None) -> np.ndarray:
    """Returns the sum of squared changes of every target from row 0, over the selected elements, [J] float64."""
    total = np.zeros(len(chunks.tensors) - 1)
    for start, count, raw in chunks:
        numbers = () if selected is None else selected.numbers(start, count)
        for j, change in enumerate(programs.changes(raw, numbers)):
            change = np.asarray(change)
            total[j] += float(np.dot(change, change))
    return total


class _Selection(NamedTuple):
    """The k largest elements: those above a threshold, and of those equal to it the ones before a flat index."""

    bits: int
    bound: int

    def numbers(self, start: int, count: int) -> tuple[np.uint32, np.int32]:
        return np.uint32(self.bits), np.int32(min(max(self.bound - start, 0), count))


_NOTHING = _Selection(2**32 - 1, 0)  # the bits of a NaN


def _select(chunks: Chunks, bits_of: Callable[[np.ndarray], Sequence[Any]], shares: Sequence[Any]) -> list[_Selection]:
    """Selects among several kinds of values at once.

    Args:
        chunks: the matrix.
        bits_of: raw [R, C] -> for every kind [C] uint32, the bits of non-negative floats.
        shares: for every kind a function (elements, elements that are not 0) -> how many are wanted.
    """
    kinds = range(len(shares))
    histograms = np.zeros((len(shares), 2**16), np.int64)
    nonzero = np.zeros(len(shares), np.int64)
    for _, count, raw in chunks:
        for kind, bits in enumerate(bits_of(raw)):
            bits = np.asarray(bits)[:count]
            nonzero[kind] += np.count_nonzero(bits)
            histograms[kind] += np.bincount(bits.view(np.uint16)[1::2], minlength=2**16)  # little-endian
    if chunks.bad:
        return [_NOTHING for _ in kinds]
    wanted = [min(int(share(chunks.size, int(nonzero[kind]))), chunks.size) for kind, share in enumerate(shares)]
    above = [np.concatenate([np.cumsum(row[::-1])[::-1], [0]]) for row in histograms]  # elements at or above a bin
    bins = [int(np.searchsorted(-row, -wish, side="right")) - 1 for row, wish in zip(above, wanted, strict=True)]
    found: list[list[np.ndarray]] = [[] for _ in kinds]  # the lower 16 bits of what is in the bin, per chunk
    for _, count, raw in chunks:
        for kind, bits in enumerate(bits_of(raw)):
            halves = np.asarray(bits)[:count].view(np.uint16)
            found[kind].append(halves[0::2][halves[1::2] == bins[kind]])
    return [
        _settle(chunks, bins[kind], wanted[kind] - int(above[kind][bins[kind] + 1]), found[kind],
                lambda kind=kind: bits_of(chunks.buffer)[kind])
        if wanted[kind] > 0
        else _NOTHING
        for kind in kinds
    ]  # fmt: skip


def _settle(
    chunks: Chunks, upper: int, rank: int, found: list[np.ndarray], bits_of_buffer: Callable[[], Any]
) -> _Selection:
    """Finds the `rank`-th largest element of a bin, and the flat index up to which its equals count."""
    histogram = sum((np.bincount(lower, minlength=2**16) for lower in found), start=np.zeros(2**16, np.int64))
    above = np.concatenate([np.cumsum(histogram[::-1])[::-1], [0]])
    lower = int(np.searchsorted(-above, -rank, side="right")) - 1
    threshold, needed = upper << 16 | lower, rank - int(above[lower + 1])
    for chunk, values in enumerate(found):
        tied = int(np.count_nonzero(values == lower))
        if tied >= needed:
            count = chunks.fill(chunk * CHUNK)
            bits = np.asarray(bits_of_buffer())[:count]
            return _Selection(threshold, chunk * CHUNK + int(np.flatnonzero(bits == threshold)[needed - 1]) + 1)
        needed -= tied
    raise RuntimeError("the tensor changed while it was read")


def _share(fraction: float) -> Fraction:
    return Fraction(fraction).limit_denominator(46340)  # as fusejax.merging.selection reads fractions


def _prepare_elementwise(method: str, chunks: Chunks, values: Mapping[str, Any]) -> Prepared:
    spec = MERGE_METHODS[method]
    arrays = {name: np.asarray(value, np.float32) for name, value in values.items() if hasattr(value, "shape")}
    options = (("method", method), ("names", tuple(arrays)), *((n, v) for n, v in values.items() if n not in arrays))
    coefficients = None
    if spec.coefficients is not None:
        nothing = np.zeros((len(chunks.tensors), 0), np.float32)
        coefficients = tuple(np.asarray(spec.coefficients(None, nothing, **values)).tolist())
    return Prepared(programs.pure, lambda start, count: tuple(arrays.values()), options, coefficients)


def _prepare_slerp(chunks: Chunks, t: float) -> Prepared:
    products = np.zeros(3)
    for _, _, raw in chunks:
        start, end = (np.asarray(row) for row in programs.widened_rows(raw))
        products += [np.dot(start, start), np.dot(end, end), np.dot(start, end)]
    norms = math.sqrt(products[0]) * math.sqrt(products[1])
    cosine = products[2] / norms if norms else 0.0
    if not abs(cosine) <= _NEARLY_PARALLEL:  # nearly parallel; a NaN is reported by the caller
        return Prepared(programs.line, lambda start, count: (np.float32(t),))
    angle = math.acos(cosine)
    factors = np.float32(math.sin((1 - t) * angle) / math.sin(angle)), np.float32(math.sin(t * angle) / math.sin(angle))
    return Prepared(programs.sum_of_two, lambda start, count: factors)


def _prepare_varm(chunks: Chunks, energy: np.ndarray) -> Prepared:
    shares = _shares(energy, 0.0)
    numbers = (shares.astype(np.float32),)
    return Prepared(programs.shifted, lambda start, count: numbers, (), tuple(shares.tolist()))


def _prepare_sce(chunks: Chunks, values: Mapping[str, Any]) -> Prepared:
    variant, topk = values["variant"], values["select_topk"]
    selected = None
    if topk < 1:
        share = _share(topk)
        if len(chunks.tensors) == 2:  # one target: it does not vary
            selected = _NOTHING
        else:
            (selected,) = _select(
                chunks, lambda raw: (programs.spread_bits(raw),), [lambda size, nonzero: share * nonzero // 1]
            )
    energy = energies(chunks, selected) / max(chunks.size, 1)
    shares = _shares(energy, programs.MERGEKIT_FLOOR if variant == "mergekit" else 0.0)
    weights = (shares.astype(np.float32),)
    masked = selected is not None and variant != "fuseai"
    options = (("variant", variant), ("masked", masked))
    if not masked or selected is None:
        return Prepared(programs.erase, lambda start, count: weights, options, tuple(shares.tolist()))
    mask = selected
    return Prepared(
        programs.erase, lambda start, count: weights + mask.numbers(start, count), options, tuple(shares.tolist())
    )


def _prepare_ties(chunks: Chunks, values: Mapping[str, Any]) -> Prepared:
    weights, scale = np.asarray(values["weights"], np.float32), np.float32(values["scale"])
    shares = [_share(density) for density in values["density"]]
    trimmed = [j for j, density in enumerate(values["density"]) if density < 1]
    counts = [functools.partial(_trim_count, shares[j]) for j in trimmed]
    found = _select(chunks, lambda raw: programs.change_bits(raw, which=tuple(trimmed)), counts) if trimmed else []
    options = (("normalize", values["normalize"]), ("trimmed", tuple(trimmed)))
    return Prepared(
        programs.elect,
        lambda start, count: (weights, scale, tuple(selected.numbers(start, count) for selected in found)),
        options,
    )


def _trim_count(share: Fraction, size: int, nonzero: int) -> int:
    del nonzero
    return max(1, int(share * size))


def _shares(energy: np.ndarray, floor: float) -> np.ndarray:
    total = energy.sum()
    if not math.isfinite(total):
        raise OverflowError
    if total == 0 or total < floor:
        return np.full(len(energy), 1 / len(energy))
    return energy / total


def _aligned(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """An array at a multiple of 64 bytes, which XLA takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)
