"""Pallas Mosaic GPU kernels for Hopper and newer: partial statistics and the dense part of `dlogits`.

A block is one warpgroup with 64 rows in registers; the copy engine keeps a few tiles of 128 columns in flight.

* Forward: a row is split over several blocks so that every multiprocessor has work; each writes its maximum and sums,
  which a few XLA operations join. The gather of `[T, G]` stays with XLA: it reads a thousandth of the logits.
* Backward: the kernel writes the softmax part of `dlogits` once. XLA then *sets* the entries at the ids to their
  totals, computed again from the statistics: in place, rounded once, deterministic, the same
  for duplicates, no atomics.
  Comparing every column with every id in the kernel would cost T * V * G integer operations, several times the rest.

Needs rows of a multiple of 16 bytes (the copy engine's rule) and compute capability 9.0; A100 has neither copy engine
nor this backend and takes `xla`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused_softmax_kl import tiling
from pallas_kernels.fused_softmax_kl.compat import gpu_interpreter, output_like
from pallas_kernels.fused_softmax_kl.xla import RowGradient, exponentials, prepare_logits, set_totals

__all__ = ["forward", "gradient", "unsupported"]

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)  # the running maximum of no logits; -inf would make NaN of -inf - -inf
_COPY_BYTES, _SWIZZLE_BYTES = 16, 128
_WGMMA = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_load: Any = plgpu.load  # its parameters differ in JAX 0.10, which this module does not serve
_kernel: Any = plgpu.kernel


def _device_too_old() -> str | None:
    if jax.default_backend() != "gpu":
        return None  # lowering for another machine
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 9.0:
        return None
    return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer, this one has {capability or 'none'}"


def unsupported(
    tokens: int, vocab: int, gathered: int, dtype: jnp.dtype, *, out: jnp.dtype | None = None
) -> str | None:
    """Returns why these kernels cannot serve a shape on the device at hand, or None; `out` is the gradient's dtype."""
    del gathered, out  # any number, and either of the two dtypes
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"logits must be float32 or bfloat16, got {jnp.dtype(dtype).name}"
    if min(tokens, vocab) == 0:
        return f"logits are empty: [{tokens}, {vocab}]"
    multiple = _COPY_BYTES // jnp.dtype(dtype).itemsize
    if vocab % multiple:
        return f"rows must be a multiple of {_COPY_BYTES} bytes: V = {vocab} is not a multiple of {multiple}"
    if jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 or newer, this is {jax.__version__}"
    return _device_too_old()


def _prepared(tile: Array, first_column: Array, limit: Array, softcap: float | None) -> Array:
    z = tile.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    columns = first_column + plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=_WGMMA)
    return jnp.where(columns < limit, z, -jnp.inf)


def _transforms(dtype: jnp.dtype) -> tuple:
    columns = _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)


def _spread(row: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(row, (row.shape[0], columns), [0])


def _constant_row(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((tiling.GPU_ROWS,), value, jnp.float32), _ROW)


def _place(blocks: tiling.GpuBlocks, steps: int) -> tuple[Array, Array, Array]:
    """Returns (row block, first column tile, number of column tiles) of this program."""
    each = -(-steps // blocks.splits)
    first = lax.axis_index("split") * each
    return lax.axis_index("row"), first, jnp.minimum(each, steps - first)


def _forward_kernel(limit_ref, z_ref, top_ref, sums_ref, *scratch, blocks, temperatures, softcap):
    row, first, count = _place(blocks, pl.cdiv(z_ref.shape[1], blocks.columns))
    limit = limit_ref[0]

    def add(indices, z_smem, carry):
        top, sums = carry
        tile = _load(z_smem, layout=_WGMMA)
        z = _prepared(tile, (first + indices[0]) * blocks.columns, limit, softcap)
        after = jnp.maximum(top, z.max(axis=1))
        decay = exponentials(top - after, temperatures)
        powers = exponentials(z - _spread(after, blocks.columns), temperatures)
        return after, tuple(s * d + p.sum(axis=1) for s, d, p in zip(sums, decay, powers, strict=True))

    pipeline = plgpu.emit_pipeline(
        add,
        grid=(count,),
        in_specs=[
            plgpu.BlockSpec(
                (blocks.rows, blocks.columns), lambda step: (row, first + step), transforms=_transforms(z_ref.dtype)
            )
        ],
        max_concurrent_steps=blocks.stages,
        init_carry=(_constant_row(_LOWEST), tuple(_constant_row(0.0) for _ in temperatures)),
    )
    top, sums = pipeline(z_ref)
    here, split = pl.ds(row * blocks.rows, blocks.rows), lax.axis_index("split")
    for buffer, value in zip(scratch, (top, *sums), strict=True):
        buffer[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch[0], top_ref.at[split, here])
    for i, buffer in enumerate(scratch[1:]):
        plgpu.copy_smem_to_gmem(buffer, sums_ref.at[split, i, here])
    plgpu.wait_smem_to_gmem(0)


def _gradient_kernel(limit_ref, rows_ref, z_ref, out_ref, out_smem, *, blocks, temperatures, softcap):
    row, first, count = _place(blocks, pl.cdiv(z_ref.shape[1], blocks.columns))
    limit, top_row = limit_ref[0], row * blocks.rows

    def column(i):
        value = _load(rows_ref.at[i, pl.ds(top_row, blocks.rows)], layout=_ROW, optimized=False)
        return _spread(value, blocks.columns)

    shift, alive, factors = column(0), column(1), [column(i + 2) for i in range(len(temperatures))]

    def write(indices, z_smem):
        (step,) = indices
        slot = lax.rem(step, 2)
        left = (first + step) * blocks.columns
        z = _prepared(_load(z_smem, layout=_WGMMA), left, limit, softcap)
        total = jnp.zeros_like(z)
        for factor, power in zip(factors, exponentials(z - shift, temperatures), strict=True):
            total += factor * power
        if softcap is not None:
            total *= jnp.where(z > -jnp.inf, 1.0 - (z / softcap) * (z / softcap), 0.0)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        out_smem[slot] = jnp.where(alive > 0, total, 0.0).astype(out_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[slot], out_ref.at[pl.ds(top_row, blocks.rows), pl.ds(left, blocks.columns)])

    plgpu.emit_pipeline(
        write,
        grid=(count,),
        in_specs=[
            plgpu.BlockSpec(
                (blocks.rows, blocks.columns), lambda step: (row, first + step), transforms=_transforms(z_ref.dtype)
            )
        ],
        max_concurrent_steps=blocks.stages,
    )(z_ref)
    plgpu.wait_smem_to_gmem(0)


def _call(kernel: Callable, blocks: tiling.GpuBlocks, tokens: int, softcap: float | None, **arguments: Any) -> Callable:
    return _kernel(
        kernel,
        grid=(pl.cdiv(tokens, blocks.rows), blocks.splits),
        grid_names=("row", "split"),
        # The approximate exponential is good to a few units in the last place, the approximate tanh to 2^-11 only.
        compiler_params=plgpu.CompilerParams(approx_math=softcap is None),
        **arguments,
    )


def _limit_operand(limit: Array | int | None, vocab: int) -> Array:
    return jnp.asarray(vocab if limit is None else limit, jnp.int32).reshape(1)


def forward(
    logits: Array,
    ids: Array,
    limit: Array | int | None,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Returns (top [T], sums [T, n], z [T, G]) of one shard, as `xla.forward` does."""
    (tokens, vocab), n = logits.shape, len(temperatures)
    blocks = tiling.gpu_blocks(tokens, vocab)
    padded = tiling.pad_to(tokens, blocks.rows)
    tops, sums = _call(
        functools.partial(_forward_kernel, blocks=blocks, temperatures=temperatures, softcap=softcap),
        blocks,
        tokens,
        softcap,
        out_type=[
            output_like((blocks.splits, padded), jnp.float32, logits),
            output_like((blocks.splits, n, padded), jnp.float32, logits),
        ],
        scratch_types=[plgpu.SMEM((blocks.rows,), jnp.float32)] * (1 + n),
        interpret=gpu_interpreter() if interpret else None,
    )(_limit_operand(limit, vocab), logits)
    top = tops.max(axis=0)
    decay = exponentials(tops - top, temperatures)
    total = jnp.stack([(sums[:, i] * scale).sum(axis=0) for i, scale in enumerate(decay)], axis=-1)[:tokens]
    top = jnp.where(top <= _LOWEST, -jnp.inf, top)[:tokens]
    z = jnp.take_along_axis(logits, jnp.maximum(ids, 0), axis=-1, mode="clip")
    z = prepare_logits(z, softcap=softcap, limit=None)
    return top, total, jnp.where(ids >= 0, z, 0.0)


def gradient(
    logits: Array,
    ids: Array,
    limit: Array | int | None,
    rows: RowGradient,
    grad_z: Array,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> Array:
    """Returns dlogits [T, V] of one shard, as `xla.gradient` does."""
    tokens, vocab = logits.shape
    blocks = tiling.gpu_blocks(tokens, vocab)
    padding = tiling.pad_to(tokens, blocks.rows) - tokens
    per_row = jnp.concatenate([rows.shift[None], rows.alive[None].astype(jnp.float32), rows.factor.T])
    dense = _call(
        functools.partial(_gradient_kernel, blocks=blocks, temperatures=temperatures, softcap=softcap),
        blocks,
        tokens,
        softcap,
        out_type=output_like((tokens, vocab), dtype, logits),
        scratch_types=[plgpu.SMEM((2, blocks.rows, blocks.columns), dtype, transforms=_transforms(dtype))],
        interpret=gpu_interpreter() if interpret else None,
    )(_limit_operand(limit, vocab), jnp.pad(per_row, [(0, 0), (0, padding)]), logits)
    if ids.shape[1] == 0:
        return dense
    return set_totals(dense, logits, ids, rows, grad_z, temperatures=temperatures, softcap=softcap)
