"""Kernels that depend on jax only; see `pallas_kernels.fused_softmax_kl` for what each one computes."""

from pallas_kernels.fused_softmax_kl import (
    LseGather,
    TokenLosses,
    linear_fused_softmax_kl,
    linear_fusion_loss,
    lse_gather,
)

__all__ = ["LseGather", "TokenLosses", "linear_fused_softmax_kl", "linear_fusion_loss", "lse_gather"]
