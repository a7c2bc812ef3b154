"""What the losses of a position weigh in a step, and the metrics made of them: shared by all ways to compute them."""

from typing import Any

import jax
import jax.numpy as jnp

from fusejax.types import FusionBatch
from pallas_kernels.fused_softmax_kl import rest_floored

__all__ = ["UNSUPERVISED", "batch_metrics", "position_weights", "spare_weight", "supervision_masks"]

Array = jax.Array
UNSUPERVISED = ("clm", "none")


def spare_weight(clm_weight: Any, fusion_weight: Any, unsupervised: str) -> Any:
    """Returns the weight of CLM where there is no distribution.

    Args:
      clm_weight, fusion_weight: numbers or arrays.
      unsupervised: "clm": CLM takes the divergence's weight too, so that every trained position counts the same;
        "none": nothing takes it, as in the papers, whose matrices have no mass there.

    Raises:
      ValueError: another value.
    """
    if unsupervised not in UNSUPERVISED:
        raise ValueError(f"unsupervised={unsupervised!r} is unknown; choose one of {', '.join(UNSUPERVISED)}")
    return clm_weight + fusion_weight if unsupervised == "clm" else clm_weight


def supervision_masks(batch: FusionBatch) -> tuple[jax.Array, jax.Array]:
    """Returns where CLM [B, T] and where each distribution [B, T, M] is wanted."""
    trained = batch.mask != 0
    mass = (batch.targets.logprobs > -jnp.inf).any(axis=-1)
    return trained, trained[..., None] & (batch.partition >= 0) & (batch.weights != 0) & mass


def position_weights(
    batch: FusionBatch,
    masks: tuple[Array, Array],
    clm_weight: Any,
    fusion_weight: Any,
    count: Any,
    *,
    unsupervised: str = "clm",
    supervised: Array | None = None,
) -> tuple[Array, Array]:
    """Returns the weights of (clm [B, T], kl [B, T, M]), normalised by `count`.

    Args:
      batch: leaves [B, T, ...].
      masks: of `supervision_masks`.
      clm_weight, fusion_weight: may be traced.
      count: trained tokens.
      unsupervised: as `spare_weight` says.
      supervised: [B, T] bool, positions that a divergence covers; None: those that have one of their own.
    """
    trained, kl_mask = masks
    supervised = kl_mask.any(axis=-1) if supervised is None else supervised
    scale = jnp.where(trained, batch.mask / count, 0.0)
    clm = scale * jnp.where(supervised, clm_weight, spare_weight(clm_weight, fusion_weight, unsupervised))
    kl = jnp.where(kl_mask, scale[..., None] * fusion_weight * batch.weights, 0.0)
    return jax.lax.stop_gradient((clm.astype(jnp.float32), kl.astype(jnp.float32)))


def batch_metrics(
    out: tuple, folded: Array, masks: tuple, batch: FusionBatch, rest: Array, sources: int
) -> dict[str, Array]:
    """Returns the metrics that `fusejax.losses.fused.batch_fusion_loss` states.

    Args:
      out: (clm [B, T], kl [B, T, M]) nats.
      folded: [B, T], events without room.
      masks: of `supervision_masks`.
      batch: leaves [B, T, ...].
      rest: [B, T, M] nats, outside the distributions.
      sources: rows of the group tables; 0: none.
    """
    clm, kl = out
    tokens = masks[0].sum(dtype=jnp.float32)
    supervised = masks[1].any(axis=-1).sum(dtype=jnp.float32)
    fusion = jnp.where(masks[1], kl * batch.weights, 0.0).sum()
    per_source = _per_source(kl, masks[1], batch, supervised, sources) if sources and kl.shape[-1] else {}
    return per_source | {
        "clm_nats": clm.sum() / jnp.maximum(tokens, 1.0),
        "fusion_nats": fusion / jnp.maximum(supervised, 1.0),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "floored_rests": rest_floored(rest, masks[1]).sum(dtype=jnp.float32),
        "folded_events": jnp.where(masks[1].any(axis=-1), folded, 0).sum(dtype=jnp.float32),
    }


def _per_source(kl: Array, mask: Array, batch: FusionBatch, supervised: Array, sources: int) -> dict[str, Array]:
    """What each row of the group tables supervises, [S]; the comparison [B, T, M, S] is summed as it is made."""
    own = mask[..., None] & (batch.partition[..., None] == jnp.arange(sources, dtype=jnp.int32))
    nats, weights = (jnp.where(own, x[..., None], 0.0).sum(axis=(0, 1, 2)) for x in (kl, batch.weights))
    positions = own.sum(axis=(0, 1, 2), dtype=jnp.float32)
    return {
        "source_nats": nats / jnp.maximum(positions, 1.0),
        "source_tokens": positions,
        "source_share": weights / jnp.maximum(supervised, 1.0),
    }
