"""The arrays of a compact record: what is stored of each, and how it comes back.

Entries are packed as in `fusejax.io.store_entries`. Everything else is a side stream, and all side streams are
deflated together, bytes of equal weight side by side:

* labels as their rank among the entries, spelt out where they are not there; tokens that are the labels shifted by
  one are not stored; byte ends as differences;
* the residual as float16 with a mantissa of seven bits (its error counts with its own mass only);
* the realised log-probability of a label among the entries as one byte, the distance from the decoded entry in
  1/512 nats; of any other label, and of the source's and of chains in an aligned record, as float16;
* all other arrays as they are.
"""

import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusejax.io.store_entries import VERSION, decode_entries, encode_entries, mass_outside

__all__ = ["ENTRIES", "HALF", "deflate", "inflate", "pack_arrays", "unpack_arrays"]

ENTRIES = (("topk_ids", "topk_logprobs"), ("ids", "logprobs"))
_RESIDUAL, _REALISED = "residual_logprob", "realised_logprob"
HALF = (_RESIDUAL, _REALISED, "source_realised", "chain_logprob")
_DIFFERENCES = ("byte_ends", "source_byte_ends")
_MISSED = 255  # the rank of a label that is not among the first 255 entries
_STEP, _SPELT = 1 / 512, -128  # nats per unit of a realised distance; the code of one that is spelt out
_DROPPED_BITS = 3  # of the residual's float16 mantissa
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
      InputError: unused entries (id -1) with mass, or ids that are too large.
    """
    layout: Layout = {}
    side: list[bytes] = []
    packed, entries = b"", None
    given = arrays.get(_RESIDUAL)
    if given is not None:
        arrays = {**arrays, _RESIDUAL: _shortened(given)}
    # Entries come first: labels and what was realised are told by them, as the reader will see them.
    for names in ENTRIES:
        if names[0] in arrays and names[1] in arrays:
            packed, entries = _pack_entries(names, arrays, given, layout, side)
            break
    ranks = _ranks(arrays, entries[0]) if entries else None
    for name, array in arrays.items():
        if name in layout or (name == "tokens" and _is_shifted(arrays)):
            continue
        layout[name] = [str(array.dtype), list(array.shape)]
        spelt: np.ndarray | None = None
        if name in HALF:
            layout[name][0] = "float32"
            array = array.astype(np.float16)
            if name == _REALISED and entries and ranks is not None:
                array, spelt = _distances(arrays[name], ranks, entries[1])
        elif name in _DIFFERENCES:
            array = _small(np.diff(array, prepend=array.dtype.type(0)))
            layout[name].append(str(array.dtype))
        elif name == "labels" and ranks is not None:
            array, spelt = ranks, _small(array[ranks == _MISSED])
        if spelt is not None:
            layout[name] += [len(spelt), str(spelt.dtype)]
            side.append(_planes(spelt))
        side.append(_planes(array))
    if "tokens" in arrays and "tokens" not in layout:
        tokens = arrays["tokens"]
        layout["tokens"] = [str(tokens.dtype), list(tokens.shape), int(tokens[0])]
    return layout, struct.pack("<I", len(packed)) + packed + deflate(b"".join(side))


def unpack_arrays(layout: Layout, body: memoryview, *, version: int = VERSION) -> dict[str, np.ndarray]:
    """Reads the bytes of `pack_arrays`, written by this `version` of `fusejax.io.store_entries`."""
    (length,) = struct.unpack("<I", body[:4])
    packed, side = body[4 : 4 + length], _Side(inflate(body[4 + length :]))
    names = next((pair for pair in ENTRIES if pair[0] in layout), None)
    rows = _take_rows(layout[names[0]], side) if names else None
    arrays: dict[str, np.ndarray] = {}
    later: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # what needs the entries: codes, and what is spelt out
    for name, (dtype, shape, *extra) in layout.items():
        if (names and name in names) or (name == "tokens" and extra):
            continue
        if name in _DIFFERENCES:
            arrays[name] = np.cumsum(side.take(shape, extra[0]), dtype=dtype)
        elif extra:
            spelt = side.take(extra[:1], extra[1])
            later[name] = side.take(shape, "uint8" if name == "labels" else "int8"), spelt
        else:
            arrays[name] = side.take(shape, "float16" if name in HALF else dtype).astype(dtype, copy=False)
    if names and rows is not None:
        ids, logprobs = _unpack_entries(layout[names[0]], packed, rows, arrays.get(_RESIDUAL), version)
        arrays[names[0]], arrays[names[1]] = ids, logprobs
        for name, (codes, spelt) in later.items():
            there = np.flatnonzero(codes != (_MISSED if name == "labels" else _SPELT))
            arrays[name] = np.empty(len(codes), layout[name][0])
            arrays[name][np.setdiff1d(np.arange(len(codes)), there, assume_unique=True)] = spelt
            ranks = later["labels"][0][there]
            found = (ids if name == "labels" else logprobs).reshape(len(codes), -1)[there, ranks]
            arrays[name][there] = found if name == "labels" else found + codes[there] * np.float32(_STEP)
    if "tokens" in layout and "tokens" not in arrays:
        dtype, _, first = layout["tokens"]
        arrays["tokens"] = np.concatenate([[first], arrays["labels"][:-1]]).astype(dtype)
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


def _shortened(residual: np.ndarray) -> np.ndarray:
    """The residual rounded to what is stored of it."""
    bits = residual.astype(np.float16).view(np.uint16).astype(np.uint32)
    finite = np.isfinite(residual)
    rounded = (bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS << _DROPPED_BITS
    return np.where(finite, rounded, bits).astype(np.uint16).view(np.float16)


def _ranks(arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray | None:
    """[N] uint8, the rank of each label among the entries of its row, or `_MISSED`; None without labels."""
    labels = arrays.get("labels")
    if labels is None or labels.ndim != 1 or len(ids) != len(labels) or not ids.size:
        return None
    found = ids.reshape(len(labels), -1)[:, :_MISSED] == labels[:, None]
    return np.where(found.any(axis=1), found.argmax(axis=1), _MISSED).astype(np.uint8)


def _distances(realised: np.ndarray, ranks: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] int8 steps from the decoded entry to what was realised, and the others as float16."""
    flat = logprobs.reshape(len(ranks), -1)
    decoded = flat[np.arange(len(ranks)), np.minimum(ranks.astype(np.intp), flat.shape[1] - 1)]
    with np.errstate(invalid="ignore"):
        steps = np.rint((realised.astype(np.float32) - decoded) * np.float32(1 / _STEP))
        near = (ranks != _MISSED) & (np.abs(steps) < -_SPELT)
    return np.where(near, steps, np.float32(_SPELT)).astype(np.int8), realised[~near].astype(np.float16)


def _pack_entries(
    names: tuple[str, str],
    arrays: Mapping[str, np.ndarray],
    given: np.ndarray | None,
    layout: Layout,
    side: list[bytes],
) -> tuple[bytes, tuple[np.ndarray, np.ndarray]]:
    """The entries' bytes, and ids and log-probabilities as they will be read."""
    ids, residual = arrays[names[0]], arrays.get(_RESIDUAL)
    flat_ids = ids.reshape(-1, ids.shape[-1])
    flat = arrays[names[1]].reshape(flat_ids.shape).astype(np.float32)
    used = np.asarray((flat_ids >= 0).any(axis=1))
    count, log_mass = int(used.sum()), None
    some = None if count == len(used) else used
    if some is not None:
        side.append(np.packbits(used).tobytes())
        flat_ids, flat = flat_ids[used], flat[used]
    if flat.shape[1] > 1 and np.any(flat[:, 1:] > flat[:, :-1]):  # the order of entries means nothing: make it falling
        order = np.argsort(-flat, axis=1, kind="stable")
        flat_ids, flat = np.take_along_axis(flat_ids, order, 1), np.take_along_axis(flat, order, 1)
    packed, width = encode_entries(flat_ids, flat)
    total = np.exp(flat).sum(axis=1, dtype=np.float64)
    if given is None or np.any(np.abs(total - _mass(given, used)) > _MASS_TOLERANCE):
        with np.errstate(divide="ignore"):
            log_mass = np.log(total).astype(np.float16)
        side.append(_planes(log_mass))
    layout[names[0]] = [str(ids.dtype), list(ids.shape), width, count, int(log_mass is not None)]
    layout[names[1]] = ["float32", list(ids.shape)]
    return packed, _unpack_entries(layout[names[0]], memoryview(packed), (some, log_mass), residual, VERSION)


def _mass(residual: np.ndarray, used: np.ndarray) -> np.ndarray:
    """What the residual leaves for the entries in the used rows."""
    return np.exp(mass_outside(residual.reshape(-1)[used]))


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
    version: int,
) -> tuple[np.ndarray, np.ndarray]:
    dtype, shape, width, count, _ = layout
    used, log_mass = rows
    if log_mass is None:
        if residual is None:
            raise ValueError("entries without residual or mass")
        flat = residual.reshape(-1)
        log_mass = mass_outside(flat if used is None else flat[used])
    sizes = {"width": width, "rows": count, "entries": shape[-1]}
    ids, logprobs = decode_entries(packed, **sizes, log_mass=log_mass, version=version)
    if used is not None:
        kept_ids, kept = ids, logprobs
        ids = np.full((len(used), shape[-1]), -1, np.int32)
        logprobs = np.full(ids.shape, -np.inf, np.float32)
        ids[used], logprobs[used] = kept_ids, kept
    return ids.reshape(shape).astype(dtype, copy=False), logprobs.reshape(shape)
