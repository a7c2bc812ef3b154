"""The merge methods once more in float64 numpy, written from the equations and without the package."""

import math
from fractions import Fraction

import numpy as np

__all__ = ["ORACLES", "at_threshold", "bf16_step", "linear", "sce", "sce_weights", "select"]


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


def at_threshold(base, targets, select_topk):
    """Which elements have the variance of the last selected one, up to float32 rounding."""
    variance = _variance(_stack(targets) - np.asarray(base).astype(np.float64))
    count = math.floor(Fraction(str(select_topk)) * int((variance != 0).sum()))
    threshold = np.sort(variance.ravel())[-max(count, 1)]
    return np.abs(variance - threshold) <= 1e-6 * threshold


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


ORACLES = {"linear": linear, "sce": sce}
