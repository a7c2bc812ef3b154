"""The definition in obvious jax.numpy: dense, differentiated by jax, slow. For tests and for reading."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["lse_gather"]

Array = jax.Array


def lse_gather(
    logits: Array,
    ids: Array,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
    valid_vocab: int | None,
    relative: bool = False,
) -> tuple[Array, Array]:
    """Returns (lse [T, n], z [T, G]) as `api.lse_gather` defines them, through a dense one-hot product."""
    z = logits.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    columns = jnp.arange(z.shape[1])
    real = columns < (z.shape[1] if valid_vocab is None else valid_vocab)
    if relative:
        z = z - jax.lax.stop_gradient(jnp.where(real, z, -jnp.inf).max(axis=-1, keepdims=True))
    masked = jnp.where(real, z, -jnp.inf)
    lse = jnp.stack([jax.nn.logsumexp(masked / t, axis=-1) for t in temperatures], axis=-1)
    chosen = (ids[:, :, None] == columns) & real
    return lse, jnp.where(chosen, z[:, None, :], 0.0).sum(axis=-1)
