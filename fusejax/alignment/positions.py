"""Positions: which source position has read exactly the bytes that a target position has read.

Two positions may be compared iff their prefixes end at the same byte: then both predict the continuation of the
same text. Byte ends are sorted, so a binary search finds the pairs in O(T log T_s) without a string in sight.

Several positions of one side may share an end: the start token and a dummy space both end at byte 0, and tokens
inside one normalised character share the end of that character. The *last* of such a run is the one that
predicts the continuation of these bytes; the earlier ones predict the rest of the run. So only the last are
paired, unless both runs have the same length: then they are paired one by one, which makes the alignment of a
tokenizer with itself the identity.

Not done here: the papers' string DTW (a parity mode of its own).
"""

import numpy as np

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["align_positions"]


def align_positions(source_ends: Array, target_ends: Array) -> Array:
    """For each target position, finds the source position whose prefix ends at the same byte.

    Args:
      source_ends: [T_s] int, bytes covered after reading each source token; not decreasing.
      target_ends: [T] int, likewise for the target.

    Returns:
      [T] int32, the source position, or -1 where none ends there. Strictly increasing over its valid entries.

    Raises:
      InputError: byte ends that decrease.
    """
    source_ends, target_ends = np.asarray(source_ends), np.asarray(target_ends)
    for name, ends in (("source_ends", source_ends), ("target_ends", target_ends)):
        if ends.ndim != 1 or (ends.size > 1 and (ends[1:] < ends[:-1]).any()):
            raise InputError(
                f"{name} has shape {ends.shape} and must be one row of byte ends that never decrease; "
                "take them from Tokenizer.encode, one document at a time."
            )
    source_left = np.searchsorted(source_ends, target_ends, side="left")
    source_right = np.searchsorted(source_ends, target_ends, side="right")
    target_left = np.searchsorted(target_ends, target_ends, side="left")
    target_right = np.searchsorted(target_ends, target_ends, side="right")
    run = source_right - source_left
    from_last = target_right - 1 - np.arange(target_ends.size)
    paired = (run > 0) & ((from_last == 0) | (run == target_right - target_left))
    return np.where(paired, source_right - 1 - from_last, -1).astype(np.int32)
