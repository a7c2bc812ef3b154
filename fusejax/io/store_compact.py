"""The arrays of a compact record: what is stored of each, and how it comes back.

Entries are packed as in `fusejax.io.store_entries`. Everything else is a side stream, and all side streams are
deflated together, bytes of equal weight side by side: residual and realised log-probabilities as float16, byte ends
as differences, labels as their rank among the entries (spelt out where they are not there). Tokens that are the
labels shifted by one are not stored. All other arrays are stored as they are.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusejax.io.store_entries import decode_entries, encode_entries, mass_outside

__all__ = ["ENTRIES", "HALF", "deflate", "inflate", "pack_arrays", "unpack_arrays"]

ENTRIES = (("topk_ids", "topk_logprobs"), ("ids", "logprobs"))
HALF = ("residual_logprob", "realised_logprob", "source_realised")
_RESIDUAL = "residual_logprob"
_DIFFERENCES = ("byte_ends", "source_byte_ends")
_MISSED = 255  # the rank of a label that is not among the first 255 entries
_MASS_TOLERANCE = 1e-3  # beyond it the mass of the entries is stored beside the residual

Layout = dict[str, list[Any]]  # name -> [dtype, shape, what its reader must know]


def deflate(data: bytes, *, words: bytes = b"") -> bytes:
    """Returns data deflated, without header or checksum, with a dictionary of likely words."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, zdict=words) if words else zlib.compressobj(6, wbits=-15)
    return packer.compress(data) + packer.flush()


def inflate(data: bytes | memoryview, *, words: bytes = b"") -> bytes:
    """Returns what `deflate` was given."""
    return zlib.decompressobj(-15, zdict=words).decompress(data)


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[Layout, bytes]:
    """Returns the layout and the bytes of a record's arrays.

    Raises:
      InputError: entries that do not fall along a row, or ids that are too large.
    """
    layout: Layout = {}
    side: list[bytes] = []
    entries, ids = b"", None
    # Entries come first: labels are told by their rank among them.
    for ids_name, logprobs_name in ENTRIES:
        if ids_name in arrays and logprobs_name in arrays:
            ids = arrays[ids_name]
            entries, extra = _pack_entries(ids, arrays[logprobs_name], arrays.get(_RESIDUAL), side)
            layout[ids_name] = [str(ids.dtype), list(ids.shape), *extra]
            layout[logprobs_name] = ["float32", list(ids.shape)]
            break
    for name, array in arrays.items():
        if name in layout or (name == "tokens" and _is_shifted(arrays)):
            continue
        layout[name] = [str(array.dtype), list(array.shape)]
        if name in HALF:
            layout[name][0] = "float32"
            array = array.astype(np.float16)
        elif name in _DIFFERENCES:
            array = _small(np.diff(array, prepend=array.dtype.type(0)))
            layout[name].append(str(array.dtype))
        elif name == "labels" and ids is not None and len(ids) == len(array):
            array, missed = _ranks(array, ids)
            layout[name] += [len(missed), str(missed.dtype)]
            side.append(_planes(missed))
        side.append(_planes(array))
    if "tokens" in arrays and "tokens" not in layout:
        tokens = arrays["tokens"]
        layout["tokens"] = [str(tokens.dtype), list(tokens.shape), int(tokens[0])]
    return layout, struct.pack("<I", len(entries)) + entries + deflate(b"".join(side))


def unpack_arrays(layout: Layout, body: memoryview) -> dict[str, np.ndarray]:
    """Reads the bytes of `pack_arrays`."""
    (length,) = struct.unpack("<I", body[:4])
    packed, side = body[4 : 4 + length], _Side(inflate(body[4 + length :]))
    ids_name, logprobs_name = next((pair for pair in ENTRIES if pair[0] in layout), ("", ""))
    rows = _take_rows(layout[ids_name], side) if ids_name else None
    arrays: dict[str, np.ndarray] = {}
    labels: tuple[np.ndarray, np.ndarray] | None = None
    for name, (dtype, shape, *extra) in layout.items():
        if name in (ids_name, logprobs_name) or (name == "tokens" and extra):
            continue
        if name in HALF:
            arrays[name] = side.take(shape, "float16").astype(dtype)
        elif name in _DIFFERENCES:
            arrays[name] = np.cumsum(side.take(shape, extra[0]), dtype=dtype)
        elif name == "labels" and extra:
            missed = side.take(extra[:1], extra[1])
            labels = side.take(shape, "uint8"), missed
        else:
            arrays[name] = side.take(shape, dtype)
    if rows is not None:
        residual = arrays.get(_RESIDUAL)
        arrays[ids_name], arrays[logprobs_name] = _unpack_entries(layout[ids_name], packed, rows, residual)
    if labels is not None:
        arrays["labels"] = _labels_of(*labels, arrays[ids_name]).astype(layout["labels"][0])
    if "tokens" in layout and "tokens" not in arrays:
        arrays["tokens"] = np.concatenate([[layout["tokens"][2]], arrays["labels"][:-1]]).astype(layout["tokens"][0])
    return arrays


class _Side:
    """The inflated side streams, read from front to back."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def take(self, shape: list[int], dtype: str) -> np.ndarray:
        """Reads the bytes of `_planes`."""
        count, size = math.prod(shape), np.dtype(dtype).itemsize
        found = np.frombuffer(self._data, np.uint8, count * size, self._at)
        self._at += count * size
        if size > 1:
            found = np.ascontiguousarray(found.reshape(size, count).T)
        return found.view(np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def _planes(array: np.ndarray) -> bytes:
    """The bytes of an array: all first bytes of its elements, then all second ones, and so on."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if little.itemsize == 1:
        return little.tobytes()
    return little.reshape(-1).view(np.uint8).reshape(-1, little.itemsize).T.tobytes()


def _small(array: np.ndarray) -> np.ndarray:
    """The array in the smallest integer dtype that holds it."""
    ends = (int(array.min(initial=0)), int(array.max(initial=0)))
    return array.astype(np.result_type(*map(np.min_scalar_type, ends)))


def _is_shifted(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether tokens are the labels shifted by one, after a first token of their own."""
    tokens, labels = arrays["tokens"], arrays.get("labels")
    return labels is not None and 0 < len(tokens) == len(labels) and np.array_equal(tokens[1:], labels[:-1])


def _ranks(labels: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each label [N] among the entries of its row, uint8, and the labels that are not there."""
    found = ids.reshape(len(labels), -1)[:, :_MISSED] == labels[:, None]
    if not found.size:
        return np.full(len(labels), _MISSED, np.uint8), _small(labels)
    there = found.any(axis=1)
    return np.where(there, found.argmax(axis=1), _MISSED).astype(np.uint8), _small(labels[~there])


def _labels_of(ranks: np.ndarray, missed: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Undoes `_ranks`."""
    flat = ids.reshape(len(ranks), -1)
    there = ranks != _MISSED
    labels = np.empty(len(ranks), np.int64)
    labels[there] = flat[np.flatnonzero(there), ranks[there]]
    labels[~there] = missed
    return labels


def _pack_entries(
    ids: np.ndarray, logprobs: np.ndarray, residual: np.ndarray | None, side: list[bytes]
) -> tuple[bytes, list[int]]:
    """The entries' bytes, and [bytes per entry, used rows, whether their mass is stored]."""
    flat_ids, flat = ids.reshape(-1, ids.shape[-1]), logprobs.reshape(-1, ids.shape[-1]).astype(np.float32)
    used = np.asarray((flat_ids >= 0).any(axis=1))
    count = int(used.sum())
    if count < len(used):
        side.append(np.packbits(used).tobytes())
        flat_ids, flat = flat_ids[used], flat[used]
    packed, width = encode_entries(flat_ids, flat)
    total = np.exp(flat).sum(axis=1, dtype=np.float64)
    explicit = residual is None or bool(np.any(np.abs(total - _mass(residual, used)) > _MASS_TOLERANCE))
    if explicit:
        with np.errstate(divide="ignore"):
            side.append(_planes(np.log(total).astype(np.float16)))
    return packed, [width, count, int(explicit)]


def _mass(residual: np.ndarray, used: np.ndarray) -> np.ndarray:
    """What a reader takes for the entries' mass in the used rows."""
    return np.exp(mass_outside(residual.astype(np.float16).reshape(-1)[used]))


def _take_rows(layout: list[Any], side: _Side) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which rows have entries (None: all), and the log of their mass where it is stored."""
    _, shape, _, count, explicit = layout
    rows = math.prod(shape[:-1])
    used = None
    if count < rows:
        used = np.unpackbits(side.take([-(-rows // 8)], "uint8"), count=rows).astype(bool)
    return used, side.take([count], "float16") if explicit else None


def _unpack_entries(
    layout: list[Any],
    packed: memoryview,
    rows: tuple[np.ndarray | None, np.ndarray | None],
    residual: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    dtype, shape, width, count, _ = layout
    used, log_mass = rows
    if log_mass is None:
        if residual is None:
            raise ValueError("entries without residual or mass")
        flat = residual.reshape(-1)
        log_mass = mass_outside(flat if used is None else flat[used])
    ids, logprobs = decode_entries(packed, width=width, rows=count, entries=shape[-1], log_mass=log_mass)
    if used is not None:
        kept_ids, kept = ids, logprobs
        ids = np.full((len(used), shape[-1]), -1, np.int32)
        logprobs = np.full(ids.shape, -np.inf, np.float32)
        ids[used], logprobs[used] = kept_ids, kept
    return ids.reshape(shape).astype(dtype, copy=False), logprobs.reshape(shape)
