"""AdamW's two moments in one byte each between updates, with an error that is bounded in units of a step.

    second moment   the number of a level of a fixed logarithmic grid, 8 levels to the octave, as a distance of at most
                    254 from the highest level of its row (a leaf's last axis): values down to 2^-31.75 of the row's
                    largest one. What is smaller and not zero is kept at the lowest level, never at zero: such elements
                    take shorter steps, not longer ones.
    first moment    its ratio to the root of the second as it is kept. By Cauchy and Schwarz that ratio is at most
                    `ratio_bound(b1, b2)`, 1.16 for (0.9, 0.95) and 7.3 for (0.9, 0.999): no scale is needed. It is
                    kept as a sign and the square of a number of 7 bits, so that small ratios are resolved better.

Both are rounded stochastically, with the exact mean: to the nearest, a moment that moves by less than half a level
would stand still. The grid is fixed, not relative to a row's largest value: otherwise a change of that value would
round the whole row anew in every update. The rounding of one update moves a second moment by 9 % at most and a ratio
by less than 2 % of its bound; over many updates the second moment's error settles at about 12 to 17 % of it (6 to 8 %
of a step's length), with mean zero.

A row is whole whatever the mesh: its maximum is exact in any order, so codes do not depend on the sharding, and a
checkpoint is restored on any other. Where the mesh cuts the last axis, that maximum costs an all-reduce of one number
per row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Coded", "decoded", "encoded", "ratio_bound"]

_PER_OCTAVE = 8  # levels of the second moment
_MOST = 255  # code of a row's highest level; 0 is zero
_RATIOS = 127


class Coded(NamedTuple):
    """Both moments of one leaf `[..., R]`."""

    ratio: jax.Array  # [..., R] int8, first moment over the root of the second
    level: jax.Array  # [..., R] uint8, second moment
    top: jax.Array  # [..., 1] int16, level of the code 255 of each row


def ratio_bound(b1: float, b2: float) -> float:
    """Returns the largest |first moment| / sqrt(second moment) that any gradients can lead to; needs b1^2 < b2."""
    return ((1 - b1) ** 2 / ((1 - b2) * (1 - b1**2 / b2))) ** 0.5


def encoded(mu: jax.Array, nu: jax.Array, bits: jax.Array, *, bound: float) -> Coded:
    """Returns the codes of a leaf's moments.

    Args:
        mu, nu: `[..., R]` float32, nu >= 0; at least one axis.
        bits: `[..., R]` uint32, random.
        bound: `ratio_bound` of the optimiser; ratios beyond it are cut.
    """
    up_nu, up_mu = (half.astype(jnp.float32) / 2**16 for half in (bits >> 16, bits & 0xFFFF))
    position = jnp.floor(_PER_OCTAVE * jnp.log2(jnp.where(nu > 0, nu, 1.0)))
    low, high = _value(position), _value(position + 1)
    position += up_nu * (high - low) < nu - low
    highest = jnp.max(jnp.where(nu > 0, position, -jnp.inf), axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(highest), highest, 0.0)
    level = jnp.where(nu > 0, jnp.clip(position - top + _MOST, 1, _MOST), 0).astype(jnp.uint8)
    top = top.astype(jnp.int16)
    root = jnp.sqrt(_second(level, top))
    ratio = jnp.where(root > 0, mu / jnp.where(root > 0, root, 1.0), 0.0)
    size = jnp.clip(jnp.abs(ratio) / bound, 0.0, 1.0)
    step = jnp.floor(_RATIOS * jnp.sqrt(size))
    low, high = (step / _RATIOS) ** 2, ((step + 1) / _RATIOS) ** 2
    step = jnp.minimum(step + (up_mu * (high - low) < size - low), _RATIOS)
    return Coded((jnp.sign(ratio) * step).astype(jnp.int8), level, top)


def decoded(codes: Coded, *, bound: float) -> tuple[jax.Array, jax.Array]:
    """Returns the first and the second moment, float32."""
    nu = _second(codes.level, codes.top)
    step = codes.ratio.astype(jnp.float32) / _RATIOS
    return bound * step * jnp.abs(step) * jnp.sqrt(nu), nu


def _value(position: jax.Array) -> jax.Array:
    return jnp.exp2(position / _PER_OCTAVE)


def _second(level: jax.Array, top: jax.Array) -> jax.Array:
    position = level.astype(jnp.float32) + (top.astype(jnp.float32) - _MOST)
    return jnp.where(level > 0, _value(position), 0.0)
