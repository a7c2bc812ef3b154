"""Pallas Mosaic kernels for TPU: statistics and gather in one read of the logits, `dlogits` in one write.

A program holds a few rows and as many columns as fit vector memory, the whole vocabulary where possible.

* Forward: the maximum first, then the sums, both over the block in vector memory, joined to the row's running
  statistics (online log-sum-exp). The gather looks up lanes: each 128-column slab is permuted by the low bits of the
  ids and kept where their high bits name the slab, three vector operations per slab whatever G is. An XLA gather after
  the kernel would lay the logits out again where V is no multiple of 128 (1.6 GB at V = 50257).
* Backward: the cotangents of the gathered logits are first added into a zeroed float32 block, one id after another
  from scalar memory, then the softmax part joins them: one rounding, duplicates add up. Comparing every column with
  every id would cost T * V * G vector operations, an XLA scatter after the kernel 4 GB of float32 copies.

Columns at and beyond the limit, and rows beyond T, are masked or dropped: no shape needs padding.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fused_softmax_kl import tiling
from pallas_kernels.fused_softmax_kl.compat import output_like
from pallas_kernels.fused_softmax_kl.xla import RowGradient, exponentials

__all__ = ["forward", "gradient", "unsupported"]

Array = jax.Array
_LOWEST = float(jnp.finfo(jnp.float32).min)  # the running maximum of no logits; -inf would make NaN of -inf - -inf
_LANES, _SLAB = tiling.TPU_LANES, tiling.TPU_SLAB
_SUBLANES = 8
_LANE_BITS = 7


def _blocks(tokens: int, vocab: int, gathered: int, dtype: jnp.dtype, out: jnp.dtype | None) -> tiling.TpuBlocks | None:
    # Per logit, double buffers twice: the logits; in the backward pass dlogits and a float32 block too.
    itemsize = min(jnp.dtype(dtype).itemsize, 4 if out is None else jnp.dtype(out).itemsize)
    per_logit = 2 * jnp.dtype(dtype).itemsize + (0 if out is None else 2 * jnp.dtype(out).itemsize + 4)
    return tiling.tpu_blocks(tokens, vocab, gathered, itemsize=itemsize, bytes_per_logit=per_logit)


def unsupported(
    tokens: int, vocab: int, gathered: int, dtype: jnp.dtype, *, out: jnp.dtype | None = None
) -> str | None:
    """Returns why these kernels cannot serve a shape, or None; `out` is the gradient's dtype, None going forward."""
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"logits must be float32 or bfloat16, got {jnp.dtype(dtype).name}"
    if min(tokens, vocab) == 0:
        return f"logits are empty: [{tokens}, {vocab}]"
    if _blocks(tokens, vocab, gathered, dtype, out) is None:
        return f"{gathered} gathered ids per row do not fit scalar memory"
    return None


def _prepared(block: Array, first_column: Array, limit: Array, softcap: float | None) -> Array:
    z = block.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    return jnp.where(first_column + lax.broadcasted_iota(jnp.int32, z.shape, 1) < limit, z, -jnp.inf)


def _lanes(slab: Array) -> list[Array]:
    return [slab[:, i : i + _LANES] for i in range(0, slab.shape[1], _LANES)]


def _forward_kernel(limit_ref, ids_ref, z_ref, top_ref, sums_ref, out_ref, *, tile, temperatures, softcap):
    (rows, columns), first = z_ref.shape, pl.program_id(1) * z_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, _LOWEST)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.loop(0, rows // tile)
    def _(group):
        here = pl.ds(pl.multiple_of(group * tile, tile), tile)
        ids = _lanes(ids_ref[here, :])

        def slab_of(step):
            at = pl.multiple_of(step * _SLAB, _SLAB)
            return _lanes(_prepared(z_ref[here, pl.ds(at, _SLAB)], first + at, limit_ref[0], softcap))

        def look(step, carry):
            top, found = carry
            for i, z in enumerate(slab_of(step)):
                top = jnp.maximum(top, z)
                number = ((first + step * _SLAB) >> _LANE_BITS) + i
                moved = [jnp.take_along_axis(z, x & (_LANES - 1), axis=1) for x in ids]
                slab = [x >> _LANE_BITS for x in ids]  # -1 of an inert id: never
                found = [jnp.where(s == number, m, f) for s, m, f in zip(slab, moved, found, strict=True)]
            return top, found

        start = jnp.full((tile, _LANES), _LOWEST), _lanes(out_ref[here, :])
        top, found = lax.fori_loop(0, columns // _SLAB, look, start)
        out_ref[here, :] = jnp.concatenate(found, axis=1)
        before = top_ref[here, :]
        after = jnp.maximum(before, top.max(axis=1, keepdims=True))
        top_ref[here, :] = after

        def add(step, sums):
            for z in slab_of(step):
                sums = [s + e for s, e in zip(sums, exponentials(z - after, temperatures), strict=True)]
            return sums

        zeros = [jnp.zeros((tile, _LANES), jnp.float32) for _ in temperatures]
        sums = lax.fori_loop(0, columns // _SLAB, add, zeros)
        decay = exponentials(before - after, temperatures)
        for i, (lane_sums, scale) in enumerate(zip(sums, decay, strict=True)):
            new = sums_ref[here, i : i + 1] * scale + lane_sums.sum(axis=1, keepdims=True)
            sums_ref[here, i : i + 1] = new


def _gradient_kernel(limit_ref, ids_ref, grad_z_ref, rows_ref, z_ref, out_ref, acc_ref, *, tile, temperatures, softcap):
    (rows, columns), first = z_ref.shape, pl.program_id(1) * z_ref.shape[1]
    acc_ref[...] = jnp.zeros_like(acc_ref)
    sublane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 1)

    @pl.loop(0, rows)
    def _(row):
        top_row = pl.multiple_of(row & -_SUBLANES, _SUBLANES)

        @pl.loop(0, ids_ref.shape[1])
        def _(g):
            column = ids_ref[row, g] - first

            @pl.when((column >= 0) & (column < columns))
            def _():
                left = pl.multiple_of(column & -_LANES, _LANES)
                here = pl.ds(top_row, _SUBLANES), pl.ds(left, _LANES)
                hit = (sublane == row - top_row) & (lane == column - left)
                acc_ref[here] += jnp.where(hit, grad_z_ref[row, g], 0.0)

    @pl.loop(0, rows // tile)
    def _(group):
        here = pl.ds(pl.multiple_of(group * tile, tile), tile)
        shift, alive = rows_ref[here, 0:1], rows_ref[here, 1:2] > 0

        @pl.loop(0, columns // _SLAB)
        def _(step):
            at = pl.multiple_of(step * _SLAB, _SLAB)
            z = _prepared(z_ref[here, pl.ds(at, _SLAB)], first + at, limit_ref[0], softcap)
            total = acc_ref[here, pl.ds(at, _SLAB)]
            for i, power in enumerate(exponentials(z - shift, temperatures)):
                total += rows_ref[here, i + 2 : i + 3] * power
            if softcap is not None:
                total *= jnp.where(z > -jnp.inf, 1.0 - (z / softcap) * (z / softcap), 0.0)
            out_ref[here, pl.ds(at, _SLAB)] = jnp.where(alive, total, 0.0).astype(out_ref.dtype)


def _limit_operand(limit: Array | int | None, vocab: int) -> Array:
    return jnp.asarray(vocab if limit is None else limit, jnp.int32).reshape(1)


def _pad_rows(x: Array, rows: int, *, value: int = 0) -> Array:
    return jnp.pad(x, [(0, rows - x.shape[0]), (0, 0)], constant_values=value)


def _params(along_vocabulary: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    semantics = "parallel", along_vocabulary
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tiling.TPU_VMEM_LIMIT_BYTES)


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
    (tokens, vocab), gathered, n = logits.shape, ids.shape[1], len(temperatures)
    blocks = _blocks(tokens, vocab, gathered, logits.dtype, None)
    assert blocks is not None  # `unsupported` is asked first
    width = tiling.pad_to(max(gathered, 1), _LANES)
    padded = tiling.pad_to(tokens, blocks.rows)
    ids = jnp.pad(ids, [(0, padded - tokens), (0, width - gathered)], constant_values=-1)
    tile = min(blocks.rows, 32 // logits.dtype.itemsize)

    def per_row(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.rows, size), lambda i, j: (i, 0))

    top, sums, z = pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile, temperatures=temperatures, softcap=softcap),
        grid=(padded // blocks.rows, pl.cdiv(vocab, blocks.columns)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            per_row(width),
            pl.BlockSpec(blocks, lambda i, j: (i, j)),
        ],
        out_specs=[per_row(1), per_row(n), per_row(width)],
        out_shape=[output_like((padded, size), jnp.float32, logits) for size in (1, n, width)],
        compiler_params=_params("arbitrary"),
        interpret=interpret,
        name="lse_gather_forward",
    )(_limit_operand(limit, vocab), ids, logits)
    top = jnp.where(top[:tokens, 0] <= _LOWEST, -jnp.inf, top[:tokens, 0])
    return top, sums[:tokens], z[:tokens, :gathered]


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
    (tokens, vocab), gathered = logits.shape, ids.shape[1]
    blocks = _blocks(tokens, vocab, gathered, logits.dtype, dtype)
    assert blocks is not None  # `unsupported` is asked first
    padded = tiling.pad_to(tokens, blocks.rows)
    if gathered == 0:
        ids, grad_z = jnp.full((tokens, 1), -1, jnp.int32), jnp.zeros((tokens, 1), jnp.float32)
    ids, grad_z = _pad_rows(ids, padded, value=-1), _pad_rows(grad_z, padded)
    columns = jnp.concatenate([rows.shift[:, None], rows.alive[:, None].astype(jnp.float32), rows.factor], axis=1)
    tile = min(blocks.rows, 32 // min(logits.dtype.itemsize, jnp.dtype(dtype).itemsize))

    def per_row(size: int, space: Any = None) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.rows, size), lambda i, j: (i, 0), memory_space=space)

    return pl.pallas_call(
        functools.partial(_gradient_kernel, tile=tile, temperatures=temperatures, softcap=softcap),
        grid=(padded // blocks.rows, pl.cdiv(vocab, blocks.columns)),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            per_row(ids.shape[1], pltpu.SMEM),
            per_row(ids.shape[1], pltpu.SMEM),
            per_row(columns.shape[1]),
            pl.BlockSpec(blocks, lambda i, j: (i, j)),
        ],
        out_specs=pl.BlockSpec(blocks, lambda i, j: (i, j)),
        out_shape=output_like((tokens, vocab), dtype, logits),
        scratch_shapes=[pltpu.VMEM(blocks, jnp.float32)],
        compiler_params=_params("parallel"),
        interpret=interpret,
        name="lse_gather_gradient",
    )(_limit_operand(limit, vocab), ids, grad_z, _pad_rows(columns, padded), logits)
