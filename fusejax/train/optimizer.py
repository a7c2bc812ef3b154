"""AdamW with clipping and a schedule with warm-up: the recipe of both papers, nothing else.

Schedules are one formula, `peak * min(warm-up, decay)`, written here rather than joined from optax pieces because
its edges matter: update n (from 0) takes `peak * (n + 1) / (warmup + 1)` during the warm-up, so that no update is
wasted on a rate of zero, and the decay reaches `final_ratio * peak` at update `total_steps`. (The papers' trainer
takes n / warmup, whose first update does nothing.)

Moments, clipping and the update itself are computed in float32 whatever dtype they are kept in. What is decayed is
decided by the caller's mask (logical axes), never by the rank: stacked norms have two axes.

What is kept between two updates may be narrower:

* Moments in bfloat16 are rounded stochastically: to the nearest they would stop moving, since with b2 = 0.999 a
  second moment falls by a thousandth per update and bfloat16 resolves 2^-8. The random bits are a function of the
  number of updates and of the place in the tree, so that a run that is resumed, or on another mesh, draws the same.
* Moments in 8 bits are codes, rounded alike; `fusejax.train.moments` says which and how far off they are.
* Parameters in bfloat16 have a float32 master copy in the optimiser's state, from which they are rounded anew after
  each update: steps below their resolution add up there.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from fusejax.errors import InputError, nearest
from fusejax.train.moments import Coded, decoded, encoded, ratio_bound
from fusejax.types import MasterState

__all__ = ["SCHEDULES", "Schedule", "make_optimizer", "make_schedule", "warmup_steps_from_ratio"]

Schedule = Callable[[Any], jax.Array]
SCHEDULES = ("cosine", "linear", "constant")
_KEPT = ("float32", "bfloat16")
_MOMENTS = (*_KEPT, "int8")


class CodedMoments(NamedTuple):
    """AdamW's moments in 8 bits: trees like the parameters, see `fusejax.train.moments.Coded`."""

    count: jax.Array  # [] int32, updates done
    mu: Any
    nu: Any
    top: Any


def warmup_steps_from_ratio(ratio: float, total_steps: int) -> int:
    """Returns ceil(ratio * total_steps), the papers' warm-up (0.008 for FuseLLM, 0.03 for FuseChat)."""
    if not 0.0 <= ratio <= 1.0:
        raise InputError(f"warmup ratio must be in [0, 1], got {ratio}.")
    return int(-(-ratio * total_steps // 1))


def make_schedule(
    kind: Literal["cosine", "linear", "constant"],
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    final_ratio: float = 0.0,
) -> Schedule:
    """Returns the learning rate as a function of the number of updates done, traceable.

    Args:
        kind: how the rate falls from `peak` to `final_ratio * peak` between the warm-up and `total_steps`.
        peak: highest learning rate.
        total_steps, warmup_steps: in updates.
        final_ratio: rate at `total_steps` and after, as a share of `peak`.

    Raises:
        InputError: an unknown kind or a number out of range.
    """
    if kind not in SCHEDULES:
        raise InputError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULES)}.{nearest(kind, SCHEDULES)}")
    if not peak >= 0 or total_steps < 1 or not 0 <= warmup_steps <= total_steps or not 0 <= final_ratio <= 1:
        raise InputError(
            f"a schedule needs peak >= 0, 0 <= warmup_steps <= total_steps, total_steps >= 1 and final_ratio in "
            f"[0, 1]; got peak {peak}, warmup_steps {warmup_steps}, total_steps {total_steps}, final {final_ratio}."
        )

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = (count + 1) / (warmup_steps + 1)
        done = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
        share = {"cosine": 0.5 * (1 + jnp.cos(jnp.pi * done)), "linear": 1 - done, "constant": jnp.ones_like(done)}
        decay = share[kind] if kind == "constant" else final_ratio + (1 - final_ratio) * share[kind]
        return peak * jnp.minimum(warm, decay)

    return schedule


def make_optimizer(
    schedule: Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    decay_mask: Any | None = None,
    moments_dtype: Literal["float32", "bfloat16", "int8"] = "float32",
    param_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Returns AdamW (decoupled decay, scaled by the rate) behind clipping by the global norm, all in float32.

    Args:
        schedule: learning rate of update n, or a number.
        b1, b2, eps, weight_decay: as in AdamW; the papers take (0.9, 0.95, decay 0.1) for FuseLLM and
            (0.9, 0.999, decay 0) for FuseChat.
        clip_norm: largest global gradient norm, None to leave gradients alone.
        decay_mask: tree of bools like the params, True where decayed; required where `weight_decay` is not 0.
        moments_dtype: in which both moments are kept; bfloat16 and int8 (codes) are rounded stochastically.
        param_dtype: in which `init_train_state` keeps the params; bfloat16 makes the state a `MasterState`.

    Raises:
        InputError: a decay without a mask, or a number out of range.
    """
    if weight_decay and decay_mask is None:
        raise InputError("weight_decay needs a decay_mask (fusejax.models.decay_mask): norms must not be decayed.")
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0 and weight_decay >= 0):
        raise InputError(f"AdamW with b1 {b1}, b2 {b2}, eps {eps}, weight_decay {weight_decay} is out of range.")
    if clip_norm is not None and not clip_norm > 0:
        raise InputError(f"clip_norm must be positive or None, got {clip_norm}.")
    kinds = (("moments_dtype", moments_dtype, _MOMENTS), ("param_dtype", param_dtype, _KEPT))
    for name, dtype, known in kinds:
        if dtype not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {dtype!r}.{nearest(dtype, known)}")
    if moments_dtype == "int8" and not b1**2 < b2:
        raise InputError(f"moments_dtype int8 needs b1^2 < b2, which bounds the step, got b1 {b1}, b2 {b2}.")
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if moments_dtype != "float32":
        adam = _with_narrow_moments(adam) if moments_dtype == "bfloat16" else _with_coded_moments(adam, b1, b2)
    parts.append(adam)
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    wide = _in_float32(optax.chain(*parts))
    return wide if param_dtype == "float32" else _with_master(wide)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies; float32 trees pass through unchanged."""

    def init(params: Any) -> Any:
        return inner.init(_cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(_cast(updates, jnp.float32), state, None if params is None else _cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def _with_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates a float32 copy of the params with `inner`; its updates lead the narrow params there."""

    def init(params: Any) -> MasterState:
        return MasterState(_cast(params, jnp.float32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MasterState]:
        if params is None:
            raise InputError("an optimizer with param_dtype bfloat16 needs the params to update them.")
        updates, inner_state = inner.update(updates, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        # Float32 differences: params + updates is the new master, and rounded to bfloat16 where it is stored.
        steps = jax.tree.map(lambda new, old: new - old.astype(jnp.float32), master, params)
        return steps, MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


def _with_narrow_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the moments of `optax.scale_by_adam` in bfloat16 between updates, each of which sees them in float32."""

    def init(params: Any) -> Any:
        state = cast(Any, adam.init(params))
        return state._replace(mu=_cast(state.mu, jnp.bfloat16), nu=_cast(state.nu, jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        updates, new = cast(Any, adam.update(updates, wide, params))
        (first, tree), second = jax.tree.flatten(new.mu), jax.tree.leaves(new.nu)
        draws = _noise(first, new.count)
        mu = [_rounded(x, bits & 0xFFFF) for x, bits in zip(first, draws, strict=True)]
        nu = [_rounded(x, bits >> 16) for x, bits in zip(second, draws, strict=True)]
        return updates, new._replace(mu=tree.unflatten(mu), nu=tree.unflatten(nu))

    return optax.GradientTransformation(init, update)


def _with_coded_moments(adam: optax.GradientTransformation, b1: float, b2: float) -> optax.GradientTransformation:
    """Keeps the moments of `optax.scale_by_adam` as codes of 8 bits, which each update sees in float32."""
    bound = ratio_bound(b1, b2)

    def init(params: Any) -> Any:
        ratio = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.int8), params)
        level = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.uint8), params)
        top = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 1), jnp.int16), params)
        return CodedMoments(jnp.zeros((), jnp.int32), ratio, level, top)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads, tree = jax.tree.flatten(updates)
        codes = map(Coded, *(tree.flatten_up_to(part) for part in state[1:]))
        mu, nu = zip(*(decoded(code, bound=bound) for code in codes), strict=True)
        wide = optax.ScaleByAdamState(state.count, tree.unflatten(mu), tree.unflatten(nu))
        updates, new = cast(Any, adam.update(updates, wide, params))
        moments = zip(jax.tree.leaves(new.mu), jax.tree.leaves(new.nu), _noise(grads, new.count), strict=True)
        kept = zip(*(encoded(*given, bound=bound) for given in moments), strict=True)
        return updates, CodedMoments(new.count, *(tree.unflatten(part) for part in kept))

    return optax.GradientTransformation(init, update)


def _noise(leaves: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    """Random uint32 for each element, from the number of updates and the place in the tree alone."""
    key = jax.random.fold_in(jax.random.key(0), count)
    return [jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint32) for i, x in enumerate(leaves)]


def _rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up with the probability that makes the mean exact; `noise` is 16 random bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)
