"""The merge methods once more in float64 numpy, written from the equations and without the package."""

import math
from fractions import Fraction

import numpy as np

__all__ = ["ORACLES", "at_threshold", "bf16_step", "linear", "sce", "sce_weights", "select", "varm"]


def bf16_step(values: np.ndarray) -> np.ndarray:
    """The distance between neighbouring bfloat16 numbers at each value."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 1e-37)))
    return 2.0 ** (exponent - 7)


def _stack(targets):
    return np.stack([np.asarray(x).astype(np.float64) for x in targets])


def linear(base, targets, *, weights, normalize=True):
    del base
    weights = np.asarray(weights, np.float64)
    total = np.tensordot(weights, _stack(targets), axes=1)
    return total / weights.sum() if normalize else total


def select(values: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest, equal ones by lowest flat index: a stable sort."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.ravel(), kind="stable")[:count]] = True
    return mask.reshape(values.shape)


def _variance(deltas):
    # Over pairs, like the sum of squares about the mean but without the rounding that would part equal values.
    pairs = [(deltas[i] - deltas[j]) ** 2 for i in range(len(deltas)) for j in range(i)]
    return sum(pairs, start=np.zeros(deltas[0].shape)) / len(deltas) ** 2


def _near_threshold(values, count):
    threshold = np.sort(values.ravel())[-max(count, 1)]
    return np.abs(values - threshold) <= 1e-6 * threshold


def at_threshold(base, targets, *, select_topk=None, density=None, weights=None, **_):
    """Which elements equal the last selected one, or have votes that cancel, up to float32 rounding."""
    deltas = _stack(targets) - np.asarray(base).astype(np.float64)
    if density is not None:
        pairs = zip(deltas, density, strict=True)
        tied = [_near_threshold(np.abs(d), math.floor(Fraction(str(s)) * d.size)) for d, s in pairs]
        kept = np.stack([trim(d, s, False) for d, s in zip(deltas, density, strict=True)])
        votes = kept * np.reshape(weights, (-1,) + (1,) * np.ndim(base))
        return np.any(tied, axis=0) | (np.abs(votes.sum(0)) <= 1e-6 * np.abs(votes).sum(0))
    variance = _variance(deltas)
    return _near_threshold(variance, math.floor(Fraction(str(select_topk)) * int((variance != 0).sum())))


def _masked(base, targets, select_topk):
    deltas = _stack(targets) - np.asarray(base).astype(np.float64)
    if select_topk >= 1:
        return deltas, deltas
    variance = _variance(deltas)
    count = math.floor(Fraction(str(select_topk)) * int((variance != 0).sum()))
    return deltas, deltas * select(variance, count)


def sce_weights(base, targets, *, select_topk=1.0, variant="fuseai"):
    _, masked = _masked(base, targets, select_topk)
    energy = (masked**2).reshape(len(masked), -1).mean(1)
    if energy.sum() == 0 or (variant == "mergekit" and energy.sum() < 1e-6):
        return np.full(len(energy), 1 / len(energy))
    return energy / energy.sum()


def sce(base, targets, *, select_topk=1.0, variant="fuseai"):
    deltas, masked = _masked(base, targets, select_topk)
    weights = sce_weights(base, targets, select_topk=select_topk, variant=variant)
    weights = weights.reshape((-1,) + (1,) * (deltas.ndim - 1))
    used = deltas if variant == "fuseai" else masked
    sign = np.sign(used.sum(0))
    if variant != "paper":
        sign = np.where(sign >= 0, 1, -1)
    kept = (np.sign(used) == sign) & (used != 0)
    base = np.asarray(base).astype(np.float64)
    merged = (weights * kept * used).sum(0)
    if variant == "paper":
        return base + merged
    norm = (weights * kept).sum(0)
    return base + merged / (np.where(norm == 0, 1, norm) if variant == "fuseai" else np.maximum(norm, 1e-6))


def _f64(array):
    return np.asarray(array).astype(np.float64)


def task_arithmetic(base, targets, *, weights, normalize=False, scale=1.0):
    total = np.tensordot(np.asarray(weights, np.float64), _stack(targets) - _f64(base), axes=1)
    return _f64(base) + scale * total / (np.sum(weights) if normalize else 1)


def trim(delta, density, rescale):
    kept = delta * select(np.abs(delta), max(1, math.floor(Fraction(str(density)) * delta.size)))
    norm = np.abs(kept).sum()
    return kept * np.abs(delta).sum() / norm if rescale and norm else kept


def ties(base, targets, *, weights, density, normalize=True, rescale=False, scale=1.0):
    weights = np.asarray(weights, np.float64).reshape((-1,) + (1,) * np.ndim(base))
    deltas = [trim(x - _f64(base), d, rescale) for x, d in zip(_stack(targets), density, strict=True)]
    deltas = np.stack(deltas) * weights
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    norm = (weights * agree).sum(0)
    return _f64(base) + scale * (deltas * agree).sum(0) / (np.where(norm == 0, 1, norm) if normalize else 1)


def slerp(base, targets, *, t):
    start, end = _stack(targets) if len(targets) == 2 else _stack([base, *targets])
    norms = np.linalg.norm(start.ravel()) * np.linalg.norm(end.ravel())
    cosine = (start * end).sum() / norms if norms else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * start + t * end
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * start + np.sin(t * angle) * end) / np.sin(angle)


def varm(base, targets, *, weights):
    """Equation 7 with known weights."""
    del base
    return np.tensordot(np.asarray(weights, np.float64), _stack(targets), axes=1)


ORACLES = {"linear": linear, "sce": sce, "slerp": slerp, "task_arithmetic": task_arithmetic, "ties": ties}
