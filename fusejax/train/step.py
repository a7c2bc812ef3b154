"""One optimiser step as a pure function: gradients over micro-batches, one normalisation, one update.

The step knows neither model nor mesh: `loss_fn` is passed in and shardings come with the arrays. The number of
trained tokens of the *whole* batch is the denominator of every micro-batch, so their losses, gradients and metrics
add up and the result does not depend on how the batch is cut (up to float32 summation order).

Micro-batch a takes rows a, a + A, a + 2A ... of the batch: each device then cuts the rows that it already holds,
and no row travels.

A step whose loss or gradient norm is not finite, or whose loss is above the limit that it is given, changes nothing:
state in equals state out, `skipped` is 1 and the caller decides (`fusejax.train.skipping`). With donated buffers the
state before the step no longer exists outside, so this is the only place where it can be kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fusejax.errors import InputError
from fusejax.types import FusionBatch, MasterState, TrainState

__all__ = ["LossFn", "TrainStep", "full_params", "init_train_state", "make_train_step"]

Metrics = dict[str, jax.Array]
MEANS = {  # metric: the count it is a mean over
    "clm_nats": "tokens",
    "fusion_nats": "supervised_tokens",
    "source_nats": "source_tokens",
    "source_share": "supervised_tokens",
    "z_loss": "tokens",
}
LossFn = Callable[[Any, FusionBatch, jax.Array], tuple[jax.Array, Metrics]]
TrainStep = Callable[..., tuple[TrainState, Metrics]]  # (state, batch[, limit])


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; traceable, so that it can be made sharded or abstract.

    The params are kept in bfloat16 where the optimizer has a float32 master copy of them.
    """
    opt_state = optimizer.init(params)
    if isinstance(opt_state, MasterState):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def full_params(state: TrainState) -> Any:
    """Returns the params of a train state at their full precision: the master copy where there is one."""
    return state.opt_state.master if isinstance(state.opt_state, MasterState) else state.params


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulation: int = 1, means: Mapping[str, str] = MEANS
) -> TrainStep:
    """Returns `(state, batch, limit=None) -> (state, metrics)`, to be jitted with the state donated.

    Args:
        loss_fn: `(params, batch, denominator) -> (loss, metrics)`: the loss is a float32 sum over the batch's
            positions divided by `denominator` ([] float32, trained tokens of the global batch); metrics are
            float32, scalars or vectors that are added up elementwise, sums unless named in `means`.
        optimizer: an optax transformation.
        accumulation: number A of micro-batches; must divide the rows of the batch.
        means: name of a metric that is a mean -> name of the metric that counts what it is a mean over.

    Returns:
        The step. Its metrics are loss_fn's, of the whole batch, and `loss`, `grad_norm` (before clipping),
        `trained_tokens`, `real_tokens` (all but padding), `skipped` (1 where the update was left out: not finite,
        or a loss above `limit`, [] float32).
    """
    if accumulation < 1:
        raise InputError(f"accumulation must be at least 1 micro-batch, got {accumulation}.")
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def train_step(state: TrainState, batch: FusionBatch, limit: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        trained = jnp.sum(batch.mask, dtype=jnp.float32)
        denominator = jnp.maximum(trained, 1.0)
        if accumulation == 1:
            (loss, metrics), grads = value_and_grad(state.params, batch, denominator)
        else:
            parts = _split(batch, accumulation)
            loss, metrics, grads = _accumulate(value_and_grad, state.params, parts, denominator, means)
        grad_norm = _global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if limit is not None:
            taken &= loss <= limit
        new = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, state)
        real = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
        extra = {"loss": loss, "grad_norm": grad_norm, "trained_tokens": trained, "real_tokens": real}
        return new, metrics | extra | {"skipped": 1.0 - taken.astype(jnp.float32)}

    return train_step


def _accumulate(
    value_and_grad: Callable[..., Any],
    params: Any,
    parts: FusionBatch,
    denominator: jax.Array,
    means: Mapping[str, str],
) -> tuple[jax.Array, Metrics, Any]:
    """Sums loss, metrics and float32 gradients over micro-batches [A, B / A, ...], holding one gradient at a time."""

    def body(carry: Any, part: FusionBatch) -> tuple[Any, None]:
        (loss, metrics), grads = value_and_grad(params, part, denominator)
        sums = {k: v * metrics[means[k]] if k in means else v for k, v in metrics.items()}
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), carry, (loss, sums, grads)), None

    first = jax.tree.map(lambda x: x[0], parts)
    (loss, metrics), _ = jax.eval_shape(value_and_grad, params, first, denominator)
    uncounted = [f"{k} (over {means[k]})" for k in metrics if k in means and means[k] not in metrics]
    if uncounted:
        raise InputError(f"loss_fn returns means without their counts: {', '.join(uncounted)}; return these too.")
    scalars = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (loss, metrics))
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    (loss, sums, grads), _ = jax.lax.scan(body, (*scalars, zeros), parts)
    metrics = {k: v / jnp.maximum(sums[means[k]], 1.0) if k in means else v for k, v in sums.items()}
    return loss, metrics, grads


def _split(batch: FusionBatch, count: int) -> FusionBatch:
    return jax.tree.map(lambda x: _split_rows(x, count), batch)


def _global_norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _split_rows(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...] without moving a row between devices."""
    rows = x.shape[0]
    if rows % count:
        raise InputError(f"{rows} rows cannot be cut into {count} micro-batches; change batch_size or accumulation.")
    shape = (rows // count, count, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
        first, *rest = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
        return jnp.swapaxes(jax.lax.reshape(x, shape, out_sharding=PartitionSpec(first, None, *rest)), 0, 1)
    return jnp.swapaxes(x.reshape(shape), 0, 1)
