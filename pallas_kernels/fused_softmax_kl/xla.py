"""The portable backend: jax.numpy that every XLA backend fuses well, and the reference for the hand-written ones.

A backend is two functions on one shard of the vocabulary; `primitive` joins the shards and owns the conventions.

* `forward(logits, ids, limit) -> (top [T], sums [T, n], z [T, G])`: the row maximum, `sum exp((z - top) / t)` and z at
  the ids. A maximum that is not finite counts as 0 in the sums.
* `gradient(logits, ids, limit, rows, grad_z) -> dlogits [T, V]`, written once.

`ids` are local to the shard and -1 where inert, so a backend needs neither the mesh nor the padding rules.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fused_softmax_kl import tiling

__all__ = ["RowGradient", "exponentials", "forward", "gradient", "prepare_logits", "set_totals"]

Array = jax.Array
_MAX_POWER = 4


class RowGradient(NamedTuple):
    """What the backward pass needs of each row."""

    shift: Array  # [T] float32
    factor: Array  # [T, n] float32, cotangent / temperature * exp(-logsum)
    alive: Array  # [T] bool; other rows get exact zeros, whatever they hold


def _powers(temperatures: Sequence[float]) -> tuple[float, list[int | None]]:
    """Returns (base, p with `base / t = p` for each temperature, None where that is no small integer)."""
    base = max(temperatures)
    ratios = [base / t for t in temperatures]
    return base, [int(r) if r.is_integer() and r <= _MAX_POWER else None for r in ratios]


def exponentials(relative: Array, temperatures: Sequence[float]) -> list[Array]:
    """Returns `exp(relative / t)` for each temperature: one exponential and products where the ratios are small."""
    base, powers = _powers(temperatures)
    root = jnp.exp(relative / base)
    out = []
    for t, power in zip(temperatures, powers, strict=True):
        if power is None:
            out.append(jnp.exp(relative / t))
        else:
            out.append(functools.reduce(operator.mul, [root] * power))
    return out


def _weighted_exponentials(relative: Array, factor: Array, temperatures: Sequence[float]) -> Array:
    """Returns `sum_i factor_i exp(relative / t_i)`, the small powers by Horner's rule.

    As a sum of products, XLA would turn `exp(x) * exp(x)` into a second exponential.
    """
    base, powers = _powers(temperatures)
    root, total = jnp.exp(relative / base), jnp.zeros_like(relative)
    for power in range(_MAX_POWER, 0, -1):
        for i in (i for i, p in enumerate(powers) if p == power):
            total += factor[:, i, None]
        total *= root
    for i in (i for i, p in enumerate(powers) if p is None):
        total += factor[:, i, None] * jnp.exp(relative / temperatures[i])
    return total


def prepare_logits(logits: Array, *, softcap: float | None, limit: Array | int | None) -> Array:
    """Returns float32 logits after the soft cap, -inf in the columns at and beyond `limit`."""
    z = logits.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return z if limit is None else jnp.where(jnp.arange(z.shape[-1]) < limit, z, -jnp.inf)


def _sums_together(z: Array, shift: Array, *, temperatures: Sequence[float]) -> Array:
    relative = z - shift[:, None]
    return jnp.stack([e.sum(axis=-1) for e in exponentials(relative, temperatures)], axis=-1)


def _sums_apart(z: Array, shift: Array, *, temperatures: Sequence[float]) -> Array:
    """One pass over the logits for each temperature: XLA's CPU backend does not vectorise two sums in one loop."""
    sums = []
    for t in temperatures:
        inverse = 1.0 / t + 0.0 * shift  # of each row, since XLA would lay out a constant like the logits
        sums.append(jnp.exp((z - shift[:, None]) * inverse[:, None]).sum(axis=-1))
        sums[-1], shift = lax.optimization_barrier((sums[-1], shift))
    return jnp.stack(sums, axis=-1)


def forward(
    logits: Array, ids: Array, limit: Array | int | None, *, temperatures: Sequence[float], softcap: float | None
) -> tuple[Array, Array, Array]:
    """Returns (top [T], sums [T, n], z [T, G]) of one shard, as the module says."""
    z = prepare_logits(logits, softcap=softcap, limit=limit)
    top = z.max(axis=-1)
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    together = functools.partial(_sums_together, temperatures=temperatures)
    if len(temperatures) == 1 or z.size <= tiling.CPU_SMALL:
        sums = together(z, shift)
    else:
        apart = functools.partial(_sums_apart, temperatures=temperatures)
        sums = lax.platform_dependent(z, shift, cpu=apart, default=together)
    gathered = jnp.take_along_axis(z, jnp.maximum(ids, 0), axis=-1, mode="clip")
    return top, sums, jnp.where(ids >= 0, gathered, 0.0)


def _slope(z: Array, softcap: float) -> Array:
    """The derivative of the soft cap from the capped logits."""
    return jnp.where(jnp.isfinite(z), 1.0 - (z / softcap) ** 2, 0.0)


def _dense(logits: Array, rows: RowGradient, limit: Array | int | None, options: tuple) -> Array:
    """The gradient without what is scattered, float32."""
    temperatures, softcap = options
    z = prepare_logits(logits, softcap=softcap, limit=limit)
    total = _weighted_exponentials(z - rows.shift[:, None], rows.factor, temperatures)
    total = total if softcap is None else total * _slope(z, softcap)
    return jnp.where(rows.alive[:, None], total, 0.0)


def _dense_in_place(logits: Array, rows: RowGradient, limit: Array | int | None, options: tuple) -> Array:
    """The same over the memory of the logits, a few rows at a time: XLA's CPU backend would take a second array."""
    size = min(tiling.cpu_rows(logits.shape[1]), logits.shape[0])

    def step(start: Array | int, count: int, logits: Array) -> Array:
        some, part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), (logits, rows))
        return lax.dynamic_update_slice_in_dim(logits, _dense(some, part, limit, options), start, axis=0)

    whole, left = divmod(logits.shape[0], size)
    logits = lax.fori_loop(0, whole, lambda i, x: step(i * size, size, x), logits)
    return step(whole * size, left, logits) if left else logits


def set_totals(
    dense: Array,
    logits: Array,
    ids: Array,
    rows: RowGradient,
    grad_z: Array,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
) -> Array:
    """Returns `dense` with the entries at `ids` replaced by their totals: rounded once, in place, deterministic."""
    z = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1, mode="clip")
    z = prepare_logits(z, softcap=softcap, limit=None)
    # XLA's GPU compiler adds up as it compares and stores no pairs: 10 MiB in all at T = 2048, G = 513.
    total = jnp.where(ids[:, :, None] == ids[:, None, :], grad_z[:, None, :], 0.0).sum(axis=-1)
    for i, power in enumerate(exponentials(z - rows.shift[:, None], temperatures)):
        total += rows.factor[:, i, None] * power
    if softcap is not None:
        total *= _slope(z, softcap)
    total = jnp.where(rows.alive[:, None], total, 0.0).astype(dense.dtype)
    at = jnp.arange(ids.shape[0])[:, None], jnp.where(ids >= 0, ids, dense.shape[1])
    return dense.at[at].set(total, mode="drop")


def _added(
    logits: Array, ids: Array, limit: Array | int | None, rows: RowGradient, grad_z: Array, options: tuple, dtype: Any
) -> Array:
    """The dense part in float32, the rest added to it, rounded last."""
    inert, (_, softcap) = ids < 0, options
    if softcap is not None:
        at_ids = jnp.take_along_axis(logits, jnp.where(inert, 0, ids), axis=-1, mode="clip")
        grad_z = grad_z * _slope(prepare_logits(at_ids, softcap=softcap, limit=None), softcap)
    grad_z = jnp.where(inert | ~rows.alive[:, None], 0.0, grad_z)
    whole = functools.partial(_dense, options=options)
    if logits.dtype == dtype == jnp.float32 and logits.size > tiling.CPU_SMALL:
        in_place = functools.partial(_dense_in_place, options=options)
        total = lax.platform_dependent(logits, rows, limit, cpu=in_place, default=whole)
    else:
        total = whole(logits, rows, limit)
    at = jnp.arange(logits.shape[0])[:, None], jnp.where(inert, logits.shape[1], ids)
    return total.at[at].add(grad_z, mode="drop").astype(dtype)


def _set(
    logits: Array, ids: Array, limit: Array | int | None, rows: RowGradient, grad_z: Array, options: tuple, dtype: Any
) -> Array:
    """The dense part rounded as it is written, and the entries at the ids set: no float32 array of the logits' size."""
    dense = _dense(logits, rows, limit, options).astype(dtype)
    return set_totals(dense, logits, ids, rows, grad_z, temperatures=options[0], softcap=options[1])


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
    """Returns dlogits [T, V]: `sum_i factor_i exp((z - shift) / t_i) + scatter(grad_z)`, through the soft cap.

    A row that is not alive has no cotangents to scatter.
    """
    how = {"options": (tuple(temperatures), softcap), "dtype": dtype}
    added = functools.partial(_added, **how)
    if dtype == jnp.float32 or ids.shape[1] == 0:
        return added(logits, ids, limit, rows, grad_z)
    default = functools.partial(_set, **how)
    return lax.platform_dependent(logits, ids, limit, rows, grad_z, cpu=added, default=default)
