"""Operations that training a model needs, from its parameter table: what a share of a device's peak is a share of."""

import math

from fusejax.models.config import ModelConfig
from fusejax.models.params import param_table

__all__ = ["flops_per_token"]


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Returns the floating-point operations of training per token, forward and backward, none counted twice.

    Six per parameter of a matrix product (the head is one, tied or not; the embedding is a look-up; of experts those
    that a token is sent to), and attention's two products over the (seq_len + 1) / 2 positions that a token sees on
    average, fewer with a window.
    """
    block = config.block
    active = block.experts_per_token / block.num_experts if block.num_experts else 1.0
    matrices = 0.0
    for path, row in param_table(config).items():
        if row.inputs or path == "head.kernel":
            matrices += math.prod(row.shape) * (active if "experts" in row.axes else 1.0)
    if config.tie_embeddings:
        matrices += config.vocab_size * config.hidden_size
    window = min(config.sliding_window or seq_len, seq_len)
    seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return round(6 * matrices + 12 * config.num_layers * config.num_heads * config.head_dim * seen)
