"""FuseLLM's objective on whole logits: a weighted sum of CLM and the divergence from fused targets.

FuseLLM (2401.10491) eq. 5 with lambda = `clm_weight`. Deviations, on purpose: positions without a distribution take
CLM with their full weight, so that every trained position counts the same; the model's softmax covers the whole
vocabulary, the target's tail is one event.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fusejax.losses.clm import clm_loss
from fusejax.losses.divergence import topk_divergence
from fusejax.losses.weights import spare_weight
from fusejax.types import TopK

__all__ = ["fusion_loss"]

Array = jax.Array


def fusion_loss(
    logits: Array,
    labels: Array,
    targets: TopK,
    mask: Array,
    *,
    clm_weight: float | Array = 0.9,
    fusion_weight: float | Array = 0.1,
    unsupervised: str = "clm",
    softcap: float | None = None,
    valid_vocab: int | None = None,
    **divergence_options: Any,
) -> tuple[Array, dict[str, Array]]:
    """Returns `clm_weight * CLM + fusion_weight * divergence`, the mean over the masked-in positions.

    A position whose targets carry no mass (all logprobs -inf) takes CLM with `clm_weight + fusion_weight`, or with
    `unsupervised="none"` with `clm_weight` alone.

    Args:
      logits: [B, T, V]; labels: [B, T] int32, already the next token.
      targets: TopK, ids [B, T, K].
      mask: [B, T], 1 where the label is trained.
      clm_weight, fusion_weight: may be traced.
      softcap, valid_vocab: as in `pallas_kernels.lse_gather`.
      **divergence_options: divergence="kl", tail="bucket", temperature=1.0, scale_by_temperature_squared=False,
        groups=None, max_members=256, as in `topk_divergence`.

    Returns:
      (loss [] float32, metrics: float32 scalars `clm_nats` per trained token, `fusion_nats` per supervised
      token, `tokens`, `supervised_tokens`).
    """
    trained = mask != 0
    supervised = trained & (targets.logprobs > -jnp.inf).any(axis=-1)
    head = {"softcap": softcap, "valid_vocab": valid_vocab}
    clm = clm_loss(logits, labels, trained, **head)
    fusion = topk_divergence(logits, targets, supervised, **head, **divergence_options)
    scale = jnp.where(trained, mask, 0.0).astype(jnp.float32)
    alone = spare_weight(clm_weight, fusion_weight, unsupervised)
    each = clm * jnp.where(supervised, clm_weight, alone) + fusion * fusion_weight
    tokens, count = scale.sum(), supervised.sum(dtype=jnp.float32)
    metrics = {
        "clm_nats": clm.sum() / jnp.maximum(trained.sum(), 1),
        "fusion_nats": fusion.sum() / jnp.maximum(count, 1.0),
        "tokens": trained.sum(dtype=jnp.float32),
        "supervised_tokens": count,
    }
    loss = jnp.where(trained, scale * each, 0.0).sum() / jnp.maximum(tokens, 1.0)
    return loss, jax.lax.stop_gradient(metrics)
