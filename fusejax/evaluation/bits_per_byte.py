"""Bits per byte: the negative log-likelihood of a text over its length in UTF-8 bytes.

Totals are taken over documents before dividing, so that every byte weighs the same; a mean of ratios would let
short documents dominate.
"""

import math
from collections.abc import Iterable

from fusejax.errors import InputError

__all__ = ["aggregate", "bits_per_byte"]


def bits_per_byte(nll_nats: float, n_bytes: int) -> float:
    """Returns NLL / (ln 2 * bytes).

    Args:
      nll_nats: negative log-likelihood of the text, nats.
      n_bytes: UTF-8 bytes of the text.

    Raises:
      InputError: no bytes, or a likelihood that is not a number.
    """
    if not n_bytes > 0:
        raise InputError(f"bits per byte of {n_bytes} bytes is not defined; leave empty documents out.")
    if math.isnan(nll_nats):
        raise InputError("the negative log-likelihood is NaN; look for NaN in the model's weights.")
    return float(nll_nats) / (math.log(2) * n_bytes)


def aggregate(parts: Iterable[tuple[float, int]]) -> float:
    """Returns the bits per byte of several texts taken together, from (nats, bytes) of each."""
    nats, sizes = zip(*parts, strict=True) if (parts := list(parts)) else ((), ())
    return bits_per_byte(math.fsum(nats), sum(sizes))
