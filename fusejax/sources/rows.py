"""The documents in packed rows, for backends that read one document at a time."""

import itertools
from typing import NamedTuple

import numpy as np

__all__ = ["Span", "spans"]


class Span(NamedTuple):
    """Positions `start:stop` of a row, which hold one segment."""

    row: int
    start: int
    stop: int


def spans(segment_ids: np.ndarray, positions: np.ndarray) -> list[Span]:
    """Returns the segments of rows `[B, T]`, without padding (0), in order.

    Raises:
        ValueError: a segment whose positions do not count from 0.
    """
    found = []
    for row, segments in enumerate(segment_ids):
        cuts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
        for start, stop in itertools.pairwise(cuts):
            if stop > start and segments[start]:
                if (positions[row, start:stop] != np.arange(stop - start)).any():
                    raise ValueError(f"the positions of segment {segments[start]} in row {row} do not count from 0")
                found.append(Span(row, start, stop))
    return found
