"""Parity: alignment, vocabulary maps and fusion as FuseLLM and FuseChat published them."""

from fusejax.alignment.parity.choose import Choice, choose_exact, choose_fusechat, choose_fusechat_v1, choose_fusellm
from fusejax.alignment.parity.dtw import StringAligner, Warp, warp
from fusejax.alignment.parity.min_ed import min_ed_map, neighbour_counts
from fusejax.alignment.parity.spelling import Vocabulary, literal_ids, vocabulary_of_bytes
from fusejax.alignment.parity.statistics import PairCounter, PairCounts, statistics_map
from fusejax.alignment.parity.transform import aligned_logits, aligned_topk

__all__ = [
    "Choice",
    "PairCounter",
    "PairCounts",
    "StringAligner",
    "Vocabulary",
    "Warp",
    "aligned_logits",
    "aligned_topk",
    "choose_exact",
    "choose_fusechat",
    "choose_fusechat_v1",
    "choose_fusellm",
    "literal_ids",
    "min_ed_map",
    "neighbour_counts",
    "statistics_map",
    "vocabulary_of_bytes",
    "warp",
]
