"""Sparse distributions: from logits, between representations, and fused over sources."""

from fusejax.distributions.fuse import avg_ce, min_ce, source_weights
from fusejax.distributions.topk import empty_topk, from_dense, normalize, to_dense, topk_from_logits, total_logprob

__all__ = [
    "avg_ce",
    "empty_topk",
    "from_dense",
    "min_ce",
    "normalize",
    "source_weights",
    "to_dense",
    "topk_from_logits",
    "total_logprob",
]
