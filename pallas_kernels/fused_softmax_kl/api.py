"""`lse_gather`, the one differentiable primitive: validation and its derivative.

`implementation` is `None` (choose by device and shape), "xla" (every backend), "tpu" (Pallas Mosaic), "mosaic_gpu"
(Pallas Mosaic GPU, Hopper and newer) or "reference" (the definition in obvious jax.numpy, dense, for tests). A name
that does not exist, or cannot serve, is an error that says why.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fused_softmax_kl import dispatch, primitive, reference
from pallas_kernels.fused_softmax_kl.primitive import RowGather, Spec

__all__ = ["LseGather", "lse_gather"]

Array = jax.Array


class LseGather(NamedTuple):
    """Log-sum-exp of each row per temperature, and the row's logits at the ids; see `lse_gather`'s `relative`."""

    lse: Array  # [T, n] float32
    z: Array  # [T, G] float32


def _check(logits: Array, ids: Array, spec: Spec) -> None:
    if logits.ndim != 2 or ids.ndim != 2 or logits.shape[0] != ids.shape[0]:
        raise ValueError(f"expected logits [T, V] and ids [T, G], got {logits.shape} and {ids.shape}")
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"expected floating logits and integer ids, got {logits.dtype} and {ids.dtype}")
    if not spec.temperatures or any(t <= 0 for t in spec.temperatures):
        raise ValueError(f"temperatures must be positive and at least one, got {spec.temperatures}")
    if spec.softcap is not None and spec.softcap <= 0:
        raise ValueError(f"softcap must be positive or None, got {spec.softcap}")
    dispatch.check_implementation(spec.implementation)


def lse_gather(
    logits: Array,
    ids: Array,
    *,
    temperatures: Sequence[float] = (1.0,),
    softcap: float | None = None,
    valid_vocab: int | None = None,
    vocab_axis: str | None = None,
    relative: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
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
      relative: `z` without the row's maximum, and `lse` of such logits: exact for logits of any size, where float32
        holds a log-sum-exp of 1e4 to 5e-4 only. The maximum counts as a constant in the derivative, so this is for
        losses that do not change when a row is shifted: cross-entropy and divergences do not, a z-loss does.
      implementation: None, "xla", "tpu", "mosaic_gpu" or "reference".
      interpret: runs a kernel in Pallas's interpreter, on any device; for tests.

    Returns:
      `LseGather(lse [T, n], z [T, G])` float32. The backward pass writes dlogits once, in the logits' dtype.

    Raises:
      ValueError: shapes, dtypes, temperatures or implementation that cannot be used.
    """
    spec = Spec(tuple(float(t) for t in temperatures), softcap, valid_vocab, vocab_axis, implementation, interpret)
    _check(logits, ids, spec)
    if implementation == "reference":
        if vocab_axis is not None:
            raise ValueError("implementation='reference' is dense and cannot take vocab_axis; use 'xla'")
        options = {"temperatures": spec.temperatures, "softcap": softcap, "valid_vocab": valid_vocab}
        return LseGather(*reference.lse_gather(logits, ids, relative=relative, **options))
    return _lse_gather((spec, relative), logits, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lse_gather(static: tuple[Spec, bool], logits: Array, ids: Array) -> LseGather:
    return _lse_gather_forward(static, logits, ids)[0]


def _lse_gather_forward(
    static: tuple[Spec, bool], logits: Array, ids: Array
) -> tuple[LseGather, tuple[Array, Array, RowGather]]:
    spec, relative = static
    stats = primitive.statistics(logits, ids, spec)
    if relative:
        return LseGather(stats.logsum, stats.z), (logits, ids, stats)
    lse = stats.logsum + stats.shift[:, None] / jnp.asarray(spec.temperatures, jnp.float32)
    valid = primitive.valid_ids(ids, primitive.whole_vocab(logits.shape[1], spec), spec.valid_vocab)
    return LseGather(lse, jnp.where(valid, stats.z + stats.shift[:, None], 0.0)), (logits, ids, stats)


def _lse_gather_backward(static: tuple[Spec, bool], saved: tuple, cotangent: LseGather) -> tuple[Array, None]:
    logits, ids, stats = saved
    cotangents = cotangent.lse, cotangent.z
    return primitive.logits_gradient(logits, ids, stats, *cotangents, static[0], dtype=logits.dtype), None


_lse_gather.defvjp(_lse_gather_forward, _lse_gather_backward)
