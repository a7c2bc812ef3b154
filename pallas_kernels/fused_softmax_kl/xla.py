"""The portable backend: jax.numpy that every XLA backend fuses well, and the reference for the hand-written ones.

A backend is two functions on one shard of the vocabulary; `primitive` joins the shards and owns the conventions.

* `forward(logits, ids, limit) -> (top [T], sums [T, n], z [T, G])`: the row maximum, `sum exp((z - top) / t)` and z at
  the ids. A maximum that is not finite counts as 0 in the sums.
* `gradient(logits, ids, limit, rows, grad_z) -> dlogits [T, V]`, written once.

`ids` are local to the shard and -1 where inert, so a backend needs neither the mesh nor the padding rules.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["RowGradient", "exponentials", "forward", "gradient", "prepare_logits"]

Array = jax.Array
_MAX_POWER = 4


class RowGradient(NamedTuple):
    """What the backward pass needs of each row."""

    shift: Array  # [T] float32
    factor: Array  # [T, n] float32, cotangent / temperature * exp(-logsum)
    alive: Array  # [T] bool; other rows get exact zeros, whatever they hold


def exponentials(relative: Array, temperatures: Sequence[float]) -> list[Array]:
    """Returns `exp(relative / t)` for each temperature: one exponential and products where the ratios are small."""
    base = max(temperatures)
    root = jnp.exp(relative / base)
    out = []
    for t in temperatures:
        power = base / t
        if power.is_integer() and power <= _MAX_POWER:
            value = root
            for _ in range(int(power) - 1):
                value = value * root
            out.append(value)
        else:
            out.append(jnp.exp(relative / t))
    return out


def prepare_logits(logits: Array, *, softcap: float | None, limit: Array | int | None) -> Array:
    """Returns float32 logits after the soft cap, -inf in the columns at and beyond `limit`."""
    z = logits.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return z if limit is None else jnp.where(jnp.arange(z.shape[-1]) < limit, z, -jnp.inf)


def forward(
    logits: Array, ids: Array, limit: Array | int | None, *, temperatures: Sequence[float], softcap: float | None
) -> tuple[Array, Array, Array]:
    """Returns (top [T], sums [T, n], z [T, G]) of one shard, as the module says."""
    z = prepare_logits(logits, softcap=softcap, limit=limit)
    top = z.max(axis=-1)
    relative = z - jnp.where(jnp.isfinite(top), top, 0.0)[:, None]
    sums = jnp.stack([e.sum(axis=-1) for e in exponentials(relative, temperatures)], axis=-1)
    gathered = jnp.take_along_axis(z, jnp.maximum(ids, 0), axis=-1, mode="clip")
    return top, sums, jnp.where(ids >= 0, gathered, 0.0)


def gradient(
    logits: Array,
    ids: Array,
    limit: Array | int | None,
    rows: RowGradient,
    grad_z: Array,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
    dtype: jnp.dtype,
) -> Array:
    """Returns dlogits [T, V]: `sum_i factor_i exp((z - shift) / t_i) + scatter(grad_z)`, through the soft cap."""
    z = prepare_logits(logits, softcap=softcap, limit=limit)
    powers = exponentials(z - rows.shift[:, None], temperatures)
    total = jnp.zeros_like(z)
    for i, power in enumerate(powers):
        total += rows.factor[:, i, None] * power
    at = jnp.arange(z.shape[0])[:, None], jnp.where(ids >= 0, ids, z.shape[-1])
    total = total.at[at].add(jnp.where(ids >= 0, grad_z, 0.0), mode="drop")
    if softcap is not None:
        total *= jnp.where(jnp.isfinite(z), 1.0 - (z / softcap) ** 2, 0.0)
    return jnp.where(rows.alive[:, None], total, 0.0).astype(dtype)
