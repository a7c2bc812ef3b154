"""Losses on arrays: they know no model, and a mesh only in `fused`. Importing this loads jax and numpy only."""

from fusejax.losses.clm import clm_loss
from fusejax.losses.divergence import topk_divergence
from fusejax.losses.events import expand_events, fold_events
from fusejax.losses.fused import batch_fusion_loss
from fusejax.losses.fusion import fusion_loss

__all__ = ["batch_fusion_loss", "clm_loss", "expand_events", "fold_events", "fusion_loss", "topk_divergence"]
