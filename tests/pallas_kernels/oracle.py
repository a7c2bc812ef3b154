"""Float64 dense numpy oracle: values and gradients of every loss, from the definition, one position at a time."""

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One random problem; `M` distributions per position."""

    logits: np.ndarray  # [T, V] float32
    labels: np.ndarray  # [T]
    ids: np.ndarray  # [T, G]
    event: np.ndarray  # [T, G]
    logprobs: np.ndarray  # [T, M, K]
    rest: np.ndarray  # [T, M]


def random_case(seed: int, *, tokens=9, vocab=23, k=4, mixed=1, members=1, scale=2.0, rest=True) -> Case:
    """Disjoint events of up to `members` ids each, a proper distribution over them and the rest."""
    rng = np.random.default_rng(seed)
    width = k * members
    ids = np.full((tokens, mixed, width), -1, np.int32)
    event = np.full((tokens, mixed, width), -1, np.int32)
    for t in range(tokens):
        for m in range(mixed):
            pool = list(rng.permutation(vocab))
            slot = 0
            for j in range(k):
                for _ in range(rng.integers(1, members + 1)):
                    ids[t, m, slot], event[t, m, slot] = pool.pop(), m * k + j
                    slot += 1
    p = rng.dirichlet(np.ones(k + 1), (tokens, mixed))
    with np.errstate(divide="ignore"):
        mass = p[..., k] if rest else 0.0 * p[..., k]
        logs = np.log(p[..., :k] / (1 if rest else p[..., :k].sum(-1, keepdims=True))), np.log(mass)
    return Case(
        (scale * rng.normal(size=(tokens, vocab))).astype(np.float32),
        rng.integers(0, vocab, tokens).astype(np.int32),
        ids.reshape(tokens, -1),
        event.reshape(tokens, -1),
        *(x.astype(np.float32) for x in logs),
    )


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def _terms(p: np.ndarray, q: np.ndarray, divergence: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns each event's term and its derivative with respect to log q."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = np.log(p), np.log(q)
        if divergence == "kl":
            return np.where(p > 0, p * (log_p - log_q), 0.0), -p
        if divergence == "ce":
            return np.where(p > 0, -p * log_q, 0.0), -p
        if divergence == "reverse_kl":
            return q * (log_q - log_p), q * (log_q - log_p + 1)
        middle = np.log(0.5 * (p + q))
        half = np.where(p > 0, p * (log_p - middle), 0.0) + q * (log_q - middle)
        return 0.5 * half, 0.5 * q * (log_q - middle)


def position(z, sets, p, rest, *, divergence="kl", tail="bucket", temperature=1.0) -> tuple[float, np.ndarray]:
    """Returns (divergence, its gradient [V]) of logits z [V] from events `sets` with probabilities `p` and `rest`."""
    q = softmax(z.astype(np.float64) / temperature)
    inside = np.zeros((len(sets), len(q)))
    for row, members in zip(inside, sets, strict=True):
        row[list(members)] = 1
    if tail == "renormalize":
        p = p / p.sum()
    outside = 1 - inside.sum(0)
    events = np.vstack([inside, outside])
    probabilities = np.append(p, rest if tail == "bucket" else 0.0)
    mass = events @ q
    value, slope = _terms(probabilities, np.maximum(mass, 1e-300), divergence)
    if tail != "bucket" and divergence in ("kl", "ce"):
        value[-1] = slope[-1] = 0.0
    gradient = slope @ (events * q / np.maximum(mass, 1e-300)[:, None]) - slope.sum() * q
    return value.sum(), gradient / temperature


def losses(case: Case, *, softcap=None, valid_vocab=None, z_loss_weight=0.0, **options) -> tuple[np.ndarray, ...]:
    """Returns (clm [T], kl [T, M], dclm [T, V], dkl [T, M, V]) in float64; gradients with respect to raw logits.

    `z_loss_weight` times the z-loss is part of clm.
    """
    tokens, vocab = case.logits.shape
    mixed, k = case.logprobs.shape[1:]
    valid = vocab if valid_vocab is None else valid_vocab
    clm, dclm = np.zeros(tokens), np.zeros((tokens, vocab))
    kl, dkl = np.zeros((tokens, mixed)), np.zeros((tokens, mixed, vocab))
    for t in range(tokens):
        raw = case.logits[t, :valid].astype(np.float64)
        z = raw if softcap is None else softcap * np.tanh(raw / softcap)
        chain = 1.0 if softcap is None else 1 - (z / softcap) ** 2
        q = softmax(z)
        lse = np.log(np.exp(z - z.max()).sum()) + z.max()
        clm[t] = -np.log(q[case.labels[t]]) + z_loss_weight * lse**2
        dclm[t, :valid] = (q - np.eye(valid)[case.labels[t]] + z_loss_weight * 2 * lse * q) * chain
        for m in range(mixed):
            sets = [set(case.ids[t][case.event[t] == m * k + j].tolist()) for j in range(k)]
            p, rest = np.exp(case.logprobs[t, m].astype(np.float64)), np.exp(float(case.rest[t, m]))
            kl[t, m], gradient = position(z, sets, p, rest, **options)
            dkl[t, m, :valid] = gradient * chain
    return clm, kl, dclm, dkl
