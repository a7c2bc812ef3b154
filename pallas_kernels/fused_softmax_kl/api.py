"""Validation, choice of implementation, and `lse_gather`, the one differentiable primitive.

`implementation` is `None` (choose by device and shape), "xla" (every backend) or "reference" (the definition
in obvious jax.numpy, dense, for tests). A name that does not exist is an error that lists those that do.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fused_softmax_kl import reference, xla

__all__ = ["IMPLEMENTATIONS", "LseGather", "lse_gather", "resolve_implementation"]

Array = jax.Array
IMPLEMENTATIONS = ("reference", "xla")


class LseGather(NamedTuple):
    """Log-sum-exp of each row per temperature, and the row's logits at the ids."""

    lse: Array  # [T, n] float32
    z: Array  # [T, G] float32


class _Static(NamedTuple):
    temperatures: tuple[float, ...]
    softcap: float | None
    valid_vocab: int | None
    vocab_axis: str | None


def resolve_implementation(name: str | None) -> str:
    """Returns the implementation to use; ValueError for an unknown name."""
    if name is None:
        return "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r} does not exist here; choose None or one of {', '.join(IMPLEMENTATIONS)}"
        )
    return name


def _check(logits: Array, ids: Array, static: _Static) -> None:
    if logits.ndim != 2 or ids.ndim != 2 or logits.shape[0] != ids.shape[0]:
        raise ValueError(f"expected logits [T, V] and ids [T, G], got {logits.shape} and {ids.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"expected floating logits and integer ids, got {logits.dtype} and {ids.dtype}")
    if not static.temperatures or any(t <= 0 for t in static.temperatures):
        raise ValueError(f"temperatures must be positive and at least one, got {static.temperatures}")
    if static.softcap is not None and static.softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {static.softcap}")


def lse_gather(
    logits: Array,
    ids: Array,
    *,
    temperatures: Sequence[float] = (1.0,),
    softcap: float | None = None,
    valid_vocab: int | None = None,
    vocab_axis: str | None = None,
    implementation: str | None = None,
) -> LseGather:
    """Returns `log sum_v exp(z_v / temperature)` of every row and the logits `z` at `ids`.

    Args:
      logits: [T, V] bfloat16, float16 or float32.
      ids: [T, G] integer; ids below 0 or at and beyond the vocabulary are inert: they gather 0 and receive
        no gradient.
      temperatures: n positive static numbers.
      softcap: replaces z by `softcap * tanh(z / softcap)` first, in `z` and `lse` alike.
      valid_vocab: columns from here on are padding: they count nowhere.
      vocab_axis: inside `jax.shard_map`, the mesh axis over which the vocabulary is split; `ids` are global.
      implementation: None, "xla" or "reference".

    Returns:
      `LseGather(lse [T, n], z [T, G])` float32. The backward pass writes dlogits once, in the logits' dtype.

    Raises:
      ValueError: shapes, dtypes, temperatures or implementation that cannot be used.
    """
    static = _Static(tuple(float(t) for t in temperatures), softcap, valid_vocab, vocab_axis)
    _check(logits, ids, static)
    if resolve_implementation(implementation) == "reference":
        if vocab_axis is not None:
            raise ValueError("implementation='reference' is dense and cannot take vocab_axis; use 'xla'")
        options = {"temperatures": static.temperatures, "softcap": softcap, "valid_vocab": valid_vocab}
        return LseGather(*reference.lse_gather(logits, ids, **options))
    return _lse_gather(static, logits, ids)


def _statistics(static: _Static, logits: Array, ids: Array) -> tuple[Array, Array, xla.RowGather]:
    z = xla.prepare_logits(logits, softcap=static.softcap, valid_vocab=static.valid_vocab, vocab_axis=static.vocab_axis)
    size = logits.shape[1] * (1 if static.vocab_axis is None else jax.lax.axis_size(static.vocab_axis))
    valid = xla.valid_ids(ids, size, static.valid_vocab)
    stats = xla.forward(z, ids, valid, temperatures=static.temperatures, vocab_axis=static.vocab_axis)
    return z, valid, stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lse_gather(static: _Static, logits: Array, ids: Array) -> LseGather:
    return _lse_gather_forward(static, logits, ids)[0]


def _lse_gather_forward(static: _Static, logits: Array, ids: Array) -> tuple[LseGather, tuple]:
    _, valid, stats = _statistics(static, logits, ids)
    lse = stats.logsum + stats.shift[:, None] / jnp.asarray(static.temperatures, jnp.float32)
    out = LseGather(lse, jnp.where(valid, stats.z + stats.shift[:, None], 0.0))
    return out, (logits, ids, valid, stats)


def _lse_gather_backward(static: _Static, saved: tuple, cotangent: LseGather) -> tuple[Array, None]:
    logits, ids, valid, stats = saved
    z = xla.prepare_logits(logits, softcap=static.softcap, valid_vocab=static.valid_vocab, vocab_axis=static.vocab_axis)
    gradient = xla.logits_gradient(
        z,
        ids,
        valid,
        stats,
        cotangent.lse,
        cotangent.z,
        temperatures=static.temperatures,
        softcap=static.softcap,
        vocab_axis=static.vocab_axis,
    )
    return gradient.astype(logits.dtype), None


_lse_gather.defvjp(_lse_gather_forward, _lse_gather_backward)
