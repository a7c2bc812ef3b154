"""What tells a damaged checkpoint from a whole one: a checksum per leaf, and a digest per small file.

A leaf's checksum mixes each element's bits with its index and sums modulo 2^32. The mix is a bijection, so one
changed element always changes the sum; it does not depend on the sharding. It runs where the array lives; host arrays
pass through one device block by block.

Checksums of leaves see every wrong number. Files also hold what Orbax does not read when it is told what to expect;
digests of files see these too. Files above `LARGE` bytes hold elements, which the leaves' checksums cover, and behind
them a table of contents, of which there may be an unread copy: of these the digest is of the size and both ends,
because reading terabytes back would cost more than writing them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from fusejax.errors import InputError

__all__ = [
    "CHECKSUMS",
    "DIGESTS",
    "DamagedCheckpoint",
    "compare",
    "damaged_files",
    "describe",
    "seal",
    "sealed_json",
    "tree_checksums",
    "unsealed_json",
    "verify",
]

CHECKSUMS = "checksums.json"  # of a model directory: leaves
DIGESTS = "digests.json"  # of a step: files
LARGE = 4 << 20
_ENDS = 1 << 20  # bytes at the ends of a large file that its digest covers
_BLOCK = 4 << 20  # elements of a host array that are summed at once


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are not what was written; another step may be whole."""


def tree_checksums(tree: Any) -> dict[str, str]:
    """Returns {leaf path: 8 hex digits}, the same for every sharding and device count."""
    sums = {path: _leaf_checksum(leaf) for path, leaf in _flatten(tree).items()}
    return {path: f"{int(value):08x}" for path, value in sums.items()}


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """Returns {leaf path: shape, dtype, checksum} as JSON values."""
    sums = tree_checksums(tree)
    return {
        path: {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype), "checksum": sums[path]}
        for path, leaf in _flatten(tree).items()
    }


def compare(saved: Mapping[str, dict], expected: Any, place: Path) -> None:
    """Raises an InputError that lists every leaf, shape and dtype that differs from what was saved."""
    wanted = _flatten(expected)
    problems = [f"{path}: not in the checkpoint" for path in wanted if path not in saved]
    problems += [f"{path}: in the checkpoint only" for path in saved if path not in wanted]
    for path, leaf in wanted.items():
        entry = saved.get(path)
        if entry and (tuple(entry["shape"]), entry["dtype"]) != (tuple(leaf.shape), str(leaf.dtype)):
            problems.append(f"{path}: saved {entry['dtype']}{entry['shape']}, expected {leaf.dtype}{list(leaf.shape)}")
    if problems:
        raise InputError(
            f"the checkpoint {place} belongs to another model or optimiser:\n  " + "\n  ".join(problems) + "\nUse the "
            "configuration it was written with, or start in a new directory."
        )


def verify(saved: Mapping[str, dict], tree: Any, place: Path) -> None:
    """Raises a DamagedCheckpoint that names every leaf whose elements are not the saved ones."""
    found = tree_checksums(tree)
    if bad := [path for path, entry in saved.items() if found.get(path) != entry["checksum"]]:
        raise DamagedCheckpoint(
            f"{place} is damaged: the checksum of {', '.join(bad)} differs from the one saved. Nothing was loaded; "
            "restore the directory from a copy, or ask for an earlier step."
        )


def seal(place: Path) -> None:
    """Writes the digests of a committed step's files beside them, once."""
    path = place / DIGESTS
    if path.exists():
        return
    fresh = path.with_name(f".{DIGESTS}.tmp")
    fresh.write_text(json.dumps(_digests(place), indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def damaged_files(place: Path) -> list[str]:
    """Returns the files of a step that are not what was written."""
    try:
        saved = json.loads((place / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [DIGESTS]
    if not isinstance(saved, dict):
        return [DIGESTS]
    found = _digests(place)
    # A size alone is what earlier versions wrote of a large file.
    sizes = {name: digest.partition(" ")[0] for name, digest in found.items()}
    names = saved.keys() | found.keys()
    return sorted(name for name in names if saved.get(name, "") not in (found.get(name), sizes.get(name)))


def sealed_json(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` with a digest of themselves."""
    return values | {"digest": _text_digest(values)}


def unsealed_json(values: dict[str, Any], place: Path) -> dict[str, Any]:
    """Returns the values under their digest; raises a DamagedCheckpoint where it does not fit."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    if values.get("digest") != _text_digest(rest):
        raise DamagedCheckpoint(f"{place} is damaged: its record of leaves and data position was changed.")
    return rest


def _text_digest(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def _digests(place: Path) -> dict[str, str]:
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and DIGESTS not in path.name)
    return {path.relative_to(place).as_posix(): _file_digest(path) for path in files}


def _file_digest(path: Path) -> str:
    digest, size = xxhash.xxh3_64(), path.stat().st_size
    with open(path, "rb") as file:
        digest.update(file.read(_ENDS if size > LARGE else size))
        if size > LARGE:
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read())
    return f"{size} {digest.hexdigest()}"


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of murmur3: a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _leaf_checksum(x: Any) -> jax.Array | int:
    if isinstance(x, jax.Array):
        return _device_checksum(x, np.uint32(0))
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype.itemsize == 8:  # without x64 a device would cut these to 32 bits
        x = x.view(np.uint32)
    starts = range(0, x.size, _BLOCK)
    sums = (_device_checksum(jnp.asarray(x[start : start + _BLOCK]), np.uint32(start % 2**32)) for start in starts)
    return sum(map(int, sums)) % 2**32


@jax.jit
def _device_checksum(x: jax.Array, start: jax.Array | np.uint32) -> jax.Array:
    """The checksum of elements that stand from `start` on, in the order of their indices."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")).astype(jnp.uint32)
    index = jnp.zeros_like(words)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(index + start + np.uint32(1))), dtype=jnp.uint32)
