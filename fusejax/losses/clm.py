"""Causal language modelling: the cross-entropy of the next token, unreduced."""

import jax
import jax.numpy as jnp

from pallas_kernels.fused_softmax_kl import clm_nats, lse_gather

__all__ = ["clm_loss"]

Array = jax.Array


def clm_loss(
    logits: Array, labels: Array, mask: Array, *, softcap: float | None = None, valid_vocab: int | None = None
) -> Array:
    """Returns the cross-entropy of every position in nats, unreduced.

    Args:
      logits: [..., V]; labels: [...] int32, the next token; one outside the vocabulary has no loss.
      mask: [...]; 0 gives exact zeros in value and gradient.
      softcap, valid_vocab: as in `pallas_kernels.lse_gather`.

    Returns:
      [...] float32.
    """
    vocab = logits.shape[-1]
    flat = labels.reshape(-1, 1)
    rows = lse_gather(logits.reshape(-1, vocab), flat, softcap=softcap, valid_vocab=valid_vocab, relative=True)
    known = (flat[:, 0] >= 0) & (flat[:, 0] < (vocab if valid_vocab is None else valid_vocab))
    return clm_nats(rows.z[:, 0], rows.lse[:, 0], known & (mask.reshape(-1) != 0)).reshape(jnp.shape(labels))
