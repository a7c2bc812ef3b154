"""Top-k entries in three bytes each: an 18-bit id and a 6-bit gap to the entry before.

Entries of a position fall, so their log-probabilities are a start and gaps. The start is not stored: the stored
residual says how much mass the entries share, which fixes it. That frees the first entry's six bits for the first
gap, the one that matters most, which thus has twelve. Gaps are coded against what the reader will have decoded, so
errors do not add up. Levels are spaced for small divergence: a gap g leaves a probability below exp(-g), so levels
may widen as it grows. `benchmarks/store.py` measures the loss.

The largest id means "unused", the largest code "probability 0". A record with a wider id has 26-bit ids in four
bytes. Positions of which no entry is used take one bit. Where the mass of a position is not one minus its residual
(distributions from elsewhere), the mass is stored too, as float16.

Deliberately not done: entropy coding of ids (it would save a third on small vocabularies, nothing on large ones,
and cost random access its speed).
"""

import numpy as np

from fusejax.errors import InputError

__all__ = ["NARROW_IDS", "WIDE_IDS", "decode_entries", "encode_entries", "mass_outside"]

NARROW_IDS, WIDE_IDS = 2**18 - 1, 2**26 - 1  # ids below these fit; the value itself means "unused"
_CODES, _FIRST_CODES = 63, 4095  # levels; the code after the last means probability 0


def _levels(count: int, *, finest: float, growth: float) -> np.ndarray:
    """[count] float32 gaps in nats from 0, whose distances grow by the factor `growth`."""
    return (finest * (growth ** np.arange(count) - 1) / (growth - 1)).astype(np.float32)


_GAPS = _levels(_CODES, finest=0.012, growth=1.075)
_FIRST_GAPS = _levels(_FIRST_CODES, finest=0.0005, growth=1.001)


def _midpoints(levels: np.ndarray) -> np.ndarray:
    return (levels[1:] + levels[:-1]) / 2


_BOUNDS, _FIRST_BOUNDS = _midpoints(_GAPS), _midpoints(_FIRST_GAPS)
_GAP_OF_CODE = np.append(_GAPS, np.float32(np.inf))
_FIRST_GAP_OF_CODE = np.append(_FIRST_GAPS, np.float32(np.inf))


def mass_outside(residual: np.ndarray) -> np.ndarray:
    """Returns log(1 - exp(residual)), the log of the entries' mass, for residual log-probabilities <= 0."""
    with np.errstate(divide="ignore"):
        return np.log(-np.expm1(np.minimum(residual.astype(np.float64), 0.0)))


def _quantise(gap: np.ndarray, bounds: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of gaps [R], NaN and inf as probability 0, and the decoded gaps."""
    code = np.searchsorted(bounds, gap).astype(np.uint32)
    code[~(gap < np.inf)] = len(levels)
    return code, levels[np.minimum(code, len(levels) - 1)]


def _gap_codes(logprobs: np.ndarray) -> np.ndarray:
    """[R, K] six-bit codes of falling log-probabilities; the first two columns are one twelve-bit code."""
    rows, entries = logprobs.shape
    codes = np.zeros((rows, entries), np.uint32)
    if entries < 2:
        return codes
    columns = np.ascontiguousarray(logprobs.T)
    with np.errstate(invalid="ignore"):
        first, gap = _quantise(columns[0] - columns[1], _FIRST_BOUNDS, _FIRST_GAPS)
        codes[:, 0], codes[:, 1] = first >> 6, first & 63
        decoded = columns[0] - gap
        for entry in range(2, entries):
            codes[:, entry], gap = _quantise(decoded - columns[entry], _BOUNDS, _GAPS)
            decoded = decoded - gap
    return codes


def encode_entries(ids: np.ndarray, logprobs: np.ndarray) -> tuple[bytes, int]:
    """Packs the entries of positions.

    Args:
      ids: [R, K] int32, -1 unused.
      logprobs: [R, K] float32 nats, falling along each row, -inf where unused.

    Returns:
      The bytes, and how many each entry has: 3, or 4 where an id needs it.

    Raises:
      InputError: log-probabilities that rise, or an id too large.
    """
    if ids.shape[1] > 1 and np.any(logprobs[:, 1:] > logprobs[:, :-1]):
        raise InputError("log-probabilities rise along a row; sort the entries of each position, most likely first")
    if np.any(logprobs[ids < 0] > -np.inf):
        raise InputError("entries with id -1 are unused and must have log-probability -inf")
    highest = int(ids.max(initial=-1))
    if highest >= WIDE_IDS or int(ids.min(initial=-1)) < -1:
        raise InputError(f"ids reach from {ids.min()} to {highest}; the store keeps -1 (unused) to {WIDE_IDS - 1}")
    unused, width = (NARROW_IDS, 3) if highest < NARROW_IDS else (WIDE_IDS, 4)
    words = np.where(ids < 0, np.uint32(unused), ids.astype(np.uint32))
    words |= _gap_codes(logprobs.astype(np.float32)) << np.uint32(18 if width == 3 else 26)
    if width == 4:
        return words.astype("<u4").tobytes(), 4
    return words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes(), 3


def decode_entries(
    data: bytes | memoryview, *, width: int, rows: int, entries: int, log_mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the bytes of `encode_entries`.

    Args:
      data: rows * entries * width bytes.
      log_mass: [rows] nats, log of the mass that the entries of a row share.

    Returns:
      ids [rows, entries] int32 and logprobs [rows, entries] float32.
    """
    if width == 4:
        words = np.frombuffer(data, "<u4").reshape(rows, entries)
    else:
        wide = np.zeros((rows * entries, 4), np.uint8)
        wide[:, :3] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        words = wide.view("<u4").reshape(rows, entries)
    bits, unused = (18, NARROW_IDS) if width == 3 else (26, WIDE_IDS)
    ids = (words & np.uint32(unused)).astype(np.int32)
    codes = words >> np.uint32(bits)
    below = _GAP_OF_CODE[codes]
    if entries > 1:
        below[:, 1] = _FIRST_GAP_OF_CODE[codes[:, 0] << np.uint32(6) | codes[:, 1]]
    below[:, 0] = 0.0
    below[ids == unused] = np.inf
    np.cumsum(below, axis=1, out=below)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.log(np.exp(-below).sum(axis=1, dtype=np.float64))
        logprobs = (log_mass - total).astype(np.float32)[:, None] - below
    logprobs[np.isinf(below)] = -np.inf
    ids[ids == unused] = -1
    return ids, logprobs
