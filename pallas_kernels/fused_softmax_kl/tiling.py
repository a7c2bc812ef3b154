"""Memory arithmetic: how many tokens a step of the scan may hold, and the blocks of the kernels.

The scan keeps one chunk of logits and reads and writes the head's gradient once per chunk. So the chunk is
the largest that a memory budget allows, never a function of the ratio of vocabulary to width: at
V = 128k a rule of that kind reads the gradient 32 times per step.
"""

from typing import NamedTuple

__all__ = [
    "CPU_LOGITS_BUDGET_BYTES",
    "CPU_SMALL",
    "LOGITS_BUDGET_BYTES",
    "GpuBlocks",
    "TpuBlocks",
    "chunk_tokens",
    "cpu_head_columns",
    "cpu_rows",
    "gpu_blocks",
    "linear_flops",
    "pad_to",
    "tpu_blocks",
]

LOGITS_BUDGET_BYTES = 512 * 2**20
# At T = 2048, D = 512, V = 32000 these are 512 tokens; half of it takes a tenth more time (docs/notes/kernels.md).
CPU_LOGITS_BUDGET_BYTES = 64 * 2**20
# Arrays with fewer elements are left to the compiler on CPU.
CPU_SMALL = 2**16
# Columns of the head's gradient that are multiplied and added at once on CPU: a few MiB, well inside a shared cache.
_CPU_HEAD_BLOCK_BYTES = 5 * 2**19
_CPU_ROWS_BYTES = 2**21  # of logits, turned into their gradient at once
_MIN_CHUNKS = 4
_ROW_MULTIPLE = 8

# TPU. Vector memory is 64 MiB on the smallest chip served (7x; 128 MiB on v5e, v5p and v6e) and a kernel gets 16 MiB
# of it unless it asks. Blocks take at most 24 MiB; the compiler's own temporaries have the rest of the limit.
TPU_VMEM_LIMIT_BYTES = 40 * 2**20
_TPU_BLOCK_BYTES = 24 * 2**20
# Scalar memory is 1 MiB; ids and their cotangents [rows, G] int32 and float32, both double-buffered, take half of it.
_TPU_SCALAR_BYTES = 512 * 2**10
_TPU_MAX_ROWS = 128
TPU_LANES = 128
TPU_SLAB = 4 * TPU_LANES  # columns handled between two loop steps: enough independent work to hide latencies

# GPU, Hopper: 227 KiB of shared memory per block; 64 rows is what one warpgroup's row reduction holds. The stages keep
# 64 x 128 float32 x 4 = 128 KiB in flight, half of that for bfloat16, which leaves room for two blocks per SM.
GPU_ROWS = 64
_GPU_COLUMNS = 128
_GPU_STAGES = 4
_GPU_SMS = 132
_GPU_WAVES = 4


class TpuBlocks(NamedTuple):
    """One program's share of the logits."""

    rows: int
    columns: int


class GpuBlocks(NamedTuple):
    """One block's tile, its pipeline depth, and how many blocks share one row."""

    rows: int
    columns: int
    stages: int
    splits: int


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


def cpu_head_columns(embed: int) -> int:
    """Returns how many columns of the head's float32 gradient are added at once on CPU: a multiple of 64."""
    return max(_CPU_HEAD_BLOCK_BYTES // (4 * embed) // 64, 1) * 64


def cpu_rows(vocab: int) -> int:
    """Returns how many rows of float32 logits are turned into their gradient at once on CPU."""
    return max(_CPU_ROWS_BYTES // (4 * max(vocab, 1)), 1)


def tpu_blocks(tokens: int, vocab: int, gathered: int, *, itemsize: int, bytes_per_logit: int) -> TpuBlocks | None:
    """Returns the blocks of the TPU kernels, or None where the gathered ids do not fit scalar memory.

    As many columns as fit, so that each id is looked at once or a few times; then as many rows as fit.

    Args:
      tokens, vocab, gathered: T, V and G.
      itemsize: bytes of a logit, which sets the rows of a hardware tile: 8 of 4 bytes, 16 of 2.
      bytes_per_logit: of block memory, all operands together, double buffers counted twice.
    """
    tile = 32 // itemsize
    scalar_rows = _TPU_SCALAR_BYTES // (16 * pad_to(max(gathered, 1), TPU_LANES))
    if scalar_rows < tile:
        return None
    fits = _TPU_BLOCK_BYTES // (bytes_per_logit * tile) // TPU_SLAB * TPU_SLAB
    columns = min(pad_to(vocab, TPU_SLAB), fits)
    rows = tile
    while 2 * rows * columns * bytes_per_logit <= _TPU_BLOCK_BYTES and 2 * rows <= min(_TPU_MAX_ROWS, scalar_rows):
        rows *= 2
    return TpuBlocks(min(rows, pad_to(tokens, tile)), columns)


def gpu_blocks(tokens: int, vocab: int) -> GpuBlocks:
    """Returns the blocks of the Hopper kernels: splits of a row so that every SM has about four blocks."""
    row_blocks = pad_to(max(tokens, 1), GPU_ROWS) // GPU_ROWS
    steps = -(-vocab // _GPU_COLUMNS)
    wanted = max(1, min(_GPU_WAVES * _GPU_SMS // row_blocks, steps // _GPU_STAGES))
    splits = -(-steps // -(-steps // wanted))  # so that none is empty
    return GpuBlocks(GPU_ROWS, _GPU_COLUMNS, min(_GPU_STAGES, steps), splits)


def linear_flops(tokens: int, embed: int, vocab: int, *, recompute: bool = False) -> int:
    """Returns the matmul operations of loss and gradients: 6TDV in one pass, 8TDV with recomputed logits."""
    return (8 if recompute else 6) * tokens * embed * vocab
