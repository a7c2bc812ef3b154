"""`tf.train.Example` as bytes, without tensorflow: what MaxText's records are.

The message is small and fixed: `Example{1: Features{1: map<string, Feature>}}` where a Feature is a list of bytes (1),
floats (2) or int64 (3). Numbers are packed, as every current writer does; unpacked ones are read too.

Deliberately not done: lists of bytes (no layout here has one), unknown fields (they are refused).
"""

__all__ = ["decode_example", "encode_example"]

import struct
from collections.abc import Mapping

import numpy as np

from fusejax.errors import InputError

_VARINT, _FIXED32, _DELIMITED = 0, 5, 2


def encode_example(features: Mapping[str, np.ndarray]) -> bytes:
    """Returns an Example of flat float32 or int64 features (other dtypes are cast); names in sorted order."""
    entries = []
    for name in sorted(features):
        values = np.asarray(features[name]).ravel()
        is_float = values.dtype.kind == "f"
        packed = values.astype("<f4").tobytes() if is_float else _varints(values.astype(np.int64))
        feature = _field(2 if is_float else 3, _field(1, packed))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode_example(data: bytes, *, where: str = "record") -> dict[str, np.ndarray]:
    """Reads an Example: name -> float32 or int64 values [n].

    Raises:
      InputError: the bytes are not an Example of floats and integers.
    """
    try:
        found = {}
        for number, features in _fields(data):
            if number != 1:
                raise ValueError(f"field {number}")
            for _, entry in _fields(features):
                pair = dict(_fields(entry))
                found[pair[1].decode()] = _values(pair.get(2, b""))
        return found
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not a tf.train.Example of floats and integers ({error})") from error


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _DELIMITED]) + _varints(np.array([len(content)])) + content


def _varints(values: np.ndarray) -> bytes:
    """Base-128 numbers, seven bits a byte, low ones first; negative ones take ten bytes."""
    rest = values.astype(np.int64).view(np.uint64)
    groups = (rest[:, None] >> (np.arange(10, dtype=np.uint64) * np.uint64(7))) & np.uint64(0x7F)
    size = np.maximum(10 - (groups[:, ::-1] != 0).argmax(axis=1), 1)
    size[(groups == 0).all(axis=1)] = 1
    used = np.arange(10) < size[:, None]
    more = np.arange(10) < size[:, None] - 1
    return (groups | (more * np.uint64(0x80))).astype(np.uint8)[used].tobytes()


def _numbers(data: bytes) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    if raw.size and raw[-1] & 0x80:
        raise ValueError("a number that does not end")
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    place = np.arange(raw.size) - np.repeat(starts, ends - starts + 1)
    if place.max(initial=0) > 9:
        raise ValueError("a number of more than ten bytes")
    parts = (raw & 0x7F).astype(np.uint64) << (place.astype(np.uint64) * np.uint64(7))
    return (np.add.reduceat(parts, starts) if ends.size else parts).view(np.int64)


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """The (number, content) pairs of a message whose fields are all delimited."""
    found, at = [], 0
    while at < len(data):
        key, at = data[at], at + 1
        if key & 7 != _DELIMITED:
            raise ValueError(f"wire type {key & 7}")
        size, at = _length(data, at)
        if at + size > len(data):
            raise ValueError("it ends too early")
        found.append((key >> 3, data[at : at + size]))
        at += size
    return found


def _length(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _values(feature: bytes) -> np.ndarray:
    ((kind, content),) = _fields(feature)
    if kind == 2 and content[:1] == bytes([1 << 3 | _FIXED32]):
        return np.array([struct.unpack_from("<f", content, at + 1)[0] for at in range(0, len(content), 5)], np.float32)
    if kind == 3 and content[:1] == bytes([1 << 3 | _VARINT]):
        found, at = [], 0
        while at < len(content):
            value, at = _length(content, at + 1)
            found.append(value)
        return np.array(found, np.uint64).view(np.int64)
    if kind not in (2, 3):
        raise ValueError(f"a feature of kind {kind}")
    packed = b"".join(part for _, part in _fields(content))
    return np.frombuffer(packed, "<f4").copy() if kind == 2 else _numbers(packed)
