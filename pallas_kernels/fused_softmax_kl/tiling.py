"""Memory arithmetic: how many tokens one step of the scan may hold.

The scan keeps one chunk of logits and reads and writes the head's gradient once per chunk. So the chunk is
the largest that a memory budget allows, never a function of the ratio of vocabulary to width: at
V = 128k a rule of that kind reads the gradient 32 times per step.
"""

__all__ = ["LOGITS_BUDGET_BYTES", "chunk_tokens", "linear_flops", "pad_to"]

LOGITS_BUDGET_BYTES = 512 * 2**20
_MIN_CHUNKS = 4
_ROW_MULTIPLE = 8


def pad_to(size: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def chunk_tokens(tokens: int, vocab: int, *, itemsize: int = 4, budget_bytes: int = LOGITS_BUDGET_BYTES) -> int:
    """Returns the tokens per chunk: a power of two in budget, at most a quarter of the tokens, at least 8.

    Args:
      tokens: positions on this device.
      vocab: columns of the logits on this device.
      itemsize: bytes of one logit.
      budget_bytes: bytes that one chunk of logits may take.
    """
    by_memory = 1 << max((budget_bytes // max(itemsize * vocab, 1)).bit_length() - 1, 0)
    by_count = pad_to(-(-tokens // _MIN_CHUNKS), _ROW_MULTIPLE)
    return max(min(by_memory, by_count), _ROW_MULTIPLE)


def linear_flops(tokens: int, embed: int, vocab: int, *, recompute: bool = False) -> int:
    """Returns the matmul operations of loss and gradients: 6TDV in one pass, 8TDV with recomputed logits."""
    return (8 if recompute else 6) * tokens * embed * vocab
