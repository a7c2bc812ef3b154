"""Top-k entries in three bytes each: an 18-bit id and a 6-bit gap to the entry before.

Entries of a position fall, so their log-probabilities are a start and gaps. The start is not stored: the stored
residual says how much mass the entries share, which fixes it. That leaves the first entry's six bits to the gaps that
matter most: the bits of the first four entries are shared by the first three gaps, eight each (of fewer entries: nine
for two gaps, twelve for one). Gaps are coded against what the reader will have decoded, so errors do not add up.

Levels are spaced for small divergence. An error e of an entry with probability p costs p e^2 / 2 nats, and a gap g
leaves p below exp(-g) of the entry before: the cost is the same everywhere where levels lie exp(g / 2) apart, which
is even spacing of the square root of the ratio. Small gaps are more frequent than large ones, so levels thin out a
little faster, exp(0.65 g), down to one per nat. `benchmarks/store.py` measures the loss.

The largest id means "unused", the largest code "probability 0". A record with a wider id has 26-bit ids in four
bytes. Positions of which no entry is used take one bit. Where the mass of a position is not one minus its residual
(distributions from elsewhere), the mass is stored too, as float16.

Deliberately not done: entropy coding of ids (it would save a third on small vocabularies, nothing on large ones,
and cost random access its speed); as few bits per id as the vocabulary needs, the rest for gaps (it would change
what a store loses with the vocabulary, and the loss is far below what matters).
"""

import functools

import numpy as np

from fusejax.errors import InputError

__all__ = ["NARROW_IDS", "VERSION", "WIDE_IDS", "decode_entries", "encode_entries", "mass_outside"]

NARROW_IDS, WIDE_IDS = 2**18 - 1, 2**26 - 1  # ids below these fit; the value itself means "unused"
VERSION = 2  # of what `encode_entries` writes; 1 spaced levels otherwise
_BITS = 6  # of each entry


def _levels(count: int, *, rate: float = 0.65, floor: float = 0.02, widest: float = 14.0) -> np.ndarray:
    """[count] float32 gaps in nats from 0 to `widest`, as dense as rate * exp(-rate * gap) + floor."""
    gaps = np.linspace(0.0, widest, 20_001)
    share = 1 - np.exp(-rate * gaps) + floor * gaps
    return np.interp(np.linspace(0.0, share[-1], count), share, gaps).astype(np.float32)


def _growing_levels(count: int, *, finest: float, growth: float) -> np.ndarray:
    """[count] float32 gaps in nats from 0, whose distances grow by the factor `growth`."""
    return (finest * (growth ** np.arange(count) - 1) / (growth - 1)).astype(np.float32)


class _Spacing:
    """The levels of gaps: finer ones for the first gaps, which share the bits of the first entries."""

    def __init__(self, entries: int, *, shared: int, first: np.ndarray | None = None, other: np.ndarray | None = None):
        self.shared = min(shared, entries)  # entries whose bits are shared
        self.gaps = max(1, self.shared - 1)  # by so many gaps
        self.bits = _BITS * self.shared // self.gaps  # of each
        self.first = _levels(2**self.bits - 1) if first is None else first
        self.other = _levels(2**_BITS - 1) if other is None else other
        self.first_bounds, self.other_bounds = ((x[1:] + x[:-1]) / 2 for x in (self.first, self.other))
        self.first_of_code = np.append(self.first, np.float32(np.inf))
        self.other_of_code = np.append(self.other, np.float32(np.inf))


@functools.lru_cache(maxsize=16)
def _spacing(entries: int, version: int) -> _Spacing:
    if version == 1:
        first = _growing_levels(4095, finest=0.0005, growth=1.001)
        return _Spacing(entries, shared=2, first=first, other=_growing_levels(63, finest=0.012, growth=1.075))
    return _Spacing(entries, shared=4)


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
    """[R, K] six-bit codes of falling log-probabilities; the first columns hold the longer codes of the first gaps."""
    rows, entries = logprobs.shape
    codes = np.zeros((rows, entries), np.uint32)
    if entries < 2:
        return codes
    spacing = _spacing(entries, VERSION)
    columns = np.ascontiguousarray(logprobs.T)
    joined, decoded = np.zeros(rows, np.uint32), columns[0]
    with np.errstate(invalid="ignore"):
        for entry in range(1, entries):
            first = entry <= spacing.gaps
            bounds, levels = (spacing.first_bounds, spacing.first) if first else (spacing.other_bounds, spacing.other)
            code, gap = _quantise(decoded - columns[entry], bounds, levels)
            decoded = decoded - gap
            if first:
                joined = joined << np.uint32(spacing.bits) | code
            else:
                codes[:, entry] = code
    for entry in range(spacing.shared):
        codes[:, entry] = joined >> np.uint32(_BITS * (spacing.shared - 1 - entry)) & np.uint32(2**_BITS - 1)
    return codes


def _gaps(codes: np.ndarray, version: int) -> np.ndarray:
    """[R, K] float32 gaps of the codes of `_gap_codes`; that of the first entry is 0."""
    entries = codes.shape[1]
    spacing = _spacing(entries, version)
    gaps = spacing.other_of_code[codes]
    if entries > 1:
        joined = codes[:, 0]
        for entry in range(1, spacing.shared):
            joined = joined << np.uint32(_BITS) | codes[:, entry]
        for gap in range(spacing.gaps):
            shift = np.uint32(spacing.bits * (spacing.gaps - 1 - gap))
            gaps[:, gap + 1] = spacing.first_of_code[joined >> shift & np.uint32(2**spacing.bits - 1)]
    gaps[:, 0] = 0.0
    return gaps


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
    data: bytes | memoryview, *, width: int, rows: int, entries: int, log_mass: np.ndarray, version: int = VERSION
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the bytes of `encode_entries`.

    Args:
      data: rows * entries * width bytes.
      log_mass: [rows] nats, log of the mass that the entries of a row share.
      version: of the code that wrote them, 1 or 2.

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
    below = _gaps(words >> np.uint32(bits), version)
    below[ids == unused] = np.inf
    np.cumsum(below, axis=1, out=below)
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.log(np.exp(-below).sum(axis=1, dtype=np.float64))
        logprobs = (log_mass - total).astype(np.float32)[:, None] - below
    logprobs[np.isinf(below)] = -np.inf
    ids[ids == unused] = -1
    return ids, logprobs
