"""Cross-entropy and sparse divergences between a softmax and a few events, without dense targets.

Everything a sparse divergence needs from the logits is a log-sum-exp and the logits at a few ids
(`lse_gather`); every loss is plain `jax.numpy` on those (`losses`); `linear` fuses the output matmul by a
scan over token chunks, so that no array of shape `[tokens, vocabulary]` exists, forward or backward.
"""

from pallas_kernels.fused_softmax_kl.api import LseGather, lse_gather
from pallas_kernels.fused_softmax_kl.linear import (
    LinearOptions,
    Targets,
    linear_fused_softmax_kl,
    linear_fusion_loss,
    linear_loss_and_gradients,
    weighted_sum,
)
from pallas_kernels.fused_softmax_kl.losses import (
    DIVERGENCES,
    REST_FLOOR,
    TAILS,
    TokenLosses,
    check_options,
    clm_nats,
    divergence_sum,
    event_divergence,
    merge_duplicates,
    rest_floored,
    z_loss,
)
from pallas_kernels.fused_softmax_kl.tiling import chunk_tokens

__all__ = [
    "DIVERGENCES",
    "REST_FLOOR",
    "TAILS",
    "LinearOptions",
    "LseGather",
    "Targets",
    "TokenLosses",
    "check_options",
    "chunk_tokens",
    "clm_nats",
    "divergence_sum",
    "event_divergence",
    "linear_fused_softmax_kl",
    "linear_fusion_loss",
    "linear_loss_and_gradients",
    "lse_gather",
    "merge_duplicates",
    "rest_floored",
    "weighted_sum",
    "z_loss",
]
