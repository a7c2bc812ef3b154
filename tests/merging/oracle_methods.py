"""More merge methods in float64 numpy, written from the equations and without the package; see `oracle`."""

import math
from fractions import Fraction

import numpy as np

from tests.merging import oracle

__all__ = ["ORACLES"]


def _f64(array):
    return np.asarray(array).astype(np.float64)


def _stack(targets):
    return np.stack([_f64(x) for x in targets])


def _count(share, size):
    return math.floor(Fraction(str(share)) * size)


def _crumbs(base, targets, density, gamma):
    results = []
    for target, share, top in zip(targets, density, gamma, strict=True):
        delta = _f64(target) - _f64(base)
        order = np.argsort(-np.abs(delta).ravel(), kind="stable")
        kept = _count(share, delta.size)
        first = min(_count(top, delta.size), delta.size - kept)
        mask = np.zeros(delta.size, bool)
        mask[order[first : first + kept]] = True
        results.append(delta * mask.reshape(delta.shape))
    return np.stack(results)


def breadcrumbs(base, targets, *, weights, density, gamma, normalize=False, scale=1.0):
    total = np.tensordot(np.asarray(weights, np.float64), _crumbs(base, targets, density, gamma), axes=1)
    return _f64(base) + scale * total / (np.sum(weights) if normalize else 1)


def _consensus(base, deltas, weights, normalize, scale):
    weights = np.asarray(weights, np.float64).reshape((-1,) + (1,) * np.ndim(base))
    deltas = deltas * weights
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    norm = (weights * agree).sum(0)
    return _f64(base) + scale * (deltas * agree).sum(0) / (np.where(norm == 0, 1, norm) if normalize else 1)


def breadcrumbs_ties(base, targets, *, weights, density, gamma, normalize=False, scale=1.0):
    return _consensus(base, _crumbs(base, targets, density, gamma), weights, normalize, scale)


def dare_ties(base, targets, *, weights, density, normalize=False, scale=1.0, **_):
    assert set(density) == {1.0}
    return _consensus(base, _stack(targets) - _f64(base), weights, normalize, scale)


def dare_linear(base, targets, *, weights, density, normalize=False, scale=1.0, **_):
    assert set(density) == {1.0}
    return oracle.task_arithmetic(base, targets, weights=weights, normalize=normalize, scale=scale)


def _arc(start, end, t, axis):
    lengths = [np.linalg.norm(x, axis=axis, keepdims=True) for x in (start, end)]
    one, other = (x / np.where(n == 0, 1, n) for x, n in zip((start, end), lengths, strict=True))
    cosine = np.clip((one * other).sum(axis, keepdims=True), -1, 1)
    angle = np.arccos(cosine)
    straight = 1 - cosine**2 <= 1e-15
    sine = np.where(straight, 1, np.sin(angle))
    arc = (np.sin((1 - t) * angle) * start + np.sin(t * angle) * end) / sine
    return np.where(straight, (1 - t) * start + t * end, arc)


def nuslerp(base, targets, *, weights, flatten=True, row_wise=False):
    total = sum(weights)
    t = weights[1] / total if abs(total) > 1e-12 else 0.5
    start, end = _stack(targets) - (0 if base is None else _f64(base))
    shape = start.shape
    if flatten:
        start, end = start.ravel(), end.ravel()
    merged = _arc(start, end, t, 0 if row_wise and not flatten else -1).reshape(shape)
    return merged if base is None else _f64(base) + merged


def multislerp(base, targets, *, weights, normalize_weights=True):
    """With the tangent plane and back, as it is published."""
    weights = np.asarray(weights, np.float64)
    weights = weights / weights.sum() if normalize_weights else weights
    vectors = _stack(targets) - (0 if base is None else _f64(base))
    lengths = np.array([np.linalg.norm(x) for x in vectors])
    units = [x / n for x, n in zip(vectors, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean /= np.linalg.norm(mean)
    tangent = sum(w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units, strict=True))
    angle = np.linalg.norm(tangent)
    point = mean * np.cos(angle) + tangent * np.sinc(angle / np.pi)
    merged = point * (weights * lengths).sum()
    return merged if base is None else _f64(base) + merged


def karcher(base, targets, *, max_iter=10, tol=1e-5):
    del base
    vectors = _stack(targets)
    lengths = np.array([np.linalg.norm(x) for x in vectors])
    units = [x / n for x, n in zip(vectors, lengths, strict=True)]
    point = sum(units) / np.linalg.norm(sum(units))
    for _ in range(max_iter):
        tangent = np.zeros_like(point)
        for unit in units:
            cosine = np.clip((unit * point).sum(), -1, 1)
            angle = np.arccos(cosine)
            if angle > 1e-12:
                tangent += angle / np.sin(angle) * (unit - cosine * point) / len(units)
        step = np.linalg.norm(tangent)
        if step < tol:
            break
        point = np.cos(step) * point + np.sin(step) / step * tangent
        point /= np.linalg.norm(point)
    return point * lengths.mean()


def model_stock(base, targets, *, filter_wise=False):
    deltas, count = _stack(targets) - _f64(base), len(targets)
    rows = deltas if filter_wise else deltas.reshape(count, 1, -1)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    cosines = [
        (rows[i] * rows[j]).sum(-1, keepdims=True) / np.where(lengths[i] * lengths[j] == 0, 1, lengths[i] * lengths[j])
        for i in range(count)
        for j in range(i)
    ]
    cosine = np.mean(cosines, axis=0)
    below = 1 + (count - 1) * cosine
    singular = np.abs(below) < 1e-6
    t = np.where(singular, 0, count * cosine / np.where(singular, 1, below))
    if not filter_wise:
        t = t.ravel()[0]
    return t * _stack(targets).mean(0) + (1 - t) * _f64(base)


def nearswap(base, targets, *, t):
    base, target = _f64(base), _f64(targets[0])
    share = np.clip(t / np.maximum(np.abs(base - target), 1e-6), 0, 1)
    return share * target + (1 - share) * base


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def arcee_fusion(base, targets):
    base, target = _f64(base), _f64(targets[0])
    p, q = _softmax(target), _softmax(base)
    importance = np.abs(target - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    low, middle, high = np.quantile(importance, [0.25, 0.5, 0.75])
    return np.where(importance >= middle + 1.5 * (high - low), target, base)


def ram(base, targets, *, epsilon=1e-5, variant="ram", r=0.1, alpha=0.2):
    deltas = _stack(targets) - _f64(base)
    active = np.abs(deltas) > epsilon
    together = active.sum(0)
    merged = _f64(base).copy()
    for delta, mask in zip(deltas, active, strict=True):
        alone, shared = mask & (together == 1), mask & (together > 1)
        ratio = shared.sum() / alone.sum() if alone.any() else 0
        factor = 1 + r * np.clip(ratio, 0, alpha) if variant == "ramplus_tl" else 1
        merged += factor * delta * alone + delta * shared / np.maximum(together, 1)
    return merged


def passthrough(base, targets, *, scale=1.0):
    del base
    return scale * _f64(targets[0])


ORACLES = oracle.ORACLES | {
    function.__name__: function
    for function in (
        arcee_fusion, breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, karcher, model_stock, multislerp, nearswap,
        nuslerp, passthrough, ram,
    )
}  # fmt: skip
