import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fusejax.errors import InputError
from fusejax.train.optimizer import make_optimizer, make_schedule, warmup_steps_from_ratio

from .toy import toy_mask, toy_params


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_equals_its_closed_form(kind, warmup, final):
    peak, total = 3e-4, 50
    schedule = make_schedule(kind, peak=peak, total_steps=total, warmup_steps=warmup, final_ratio=final)
    for n in range(total + 5):
        if n < warmup:
            expected = peak * (n + 1) / (warmup + 1)
        else:
            done = min((n - warmup) / (total - warmup), 1.0)
            fall = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[kind]
            expected = peak * (fall if kind == "constant" else final + (1 - final) * fall)
        assert float(schedule(n)) == pytest.approx(expected, rel=1e-5, abs=1e-11)
    assert float(jax.jit(schedule)(jnp.int32(7))) == pytest.approx(float(schedule(7)))


def test_warmup_of_the_papers():
    assert warmup_steps_from_ratio(0.008, 1000) == 8
    assert warmup_steps_from_ratio(0.03, 101) == 4
    assert warmup_steps_from_ratio(0.0, 10) == 0
    with pytest.raises(InputError, match="ratio"):
        warmup_steps_from_ratio(1.5, 10)


def test_bad_arguments():
    with pytest.raises(InputError, match="Did you mean 'cosine'"):
        make_schedule("cosin", peak=1, total_steps=3)
    with pytest.raises(InputError, match="warmup_steps"):
        make_schedule("cosine", peak=1, total_steps=3, warmup_steps=4)
    with pytest.raises(InputError, match="decay_mask"):
        make_optimizer(1e-3)
    with pytest.raises(InputError, match="clip_norm"):
        make_optimizer(1e-3, weight_decay=0, clip_norm=0.0)
    with pytest.raises(InputError, match="b1"):
        make_optimizer(1e-3, weight_decay=0, b1=1.0)


def adamw_oracle(params, grads_of, steps, *, rate, b1, b2, eps, decay, clip, mask):
    """AdamW in float64 numpy, one flat dict of arrays."""
    p = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for n in range(steps):
        g = {k: x.astype(np.float64) for k, x in grads_of(n).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for k in p:
            m[k] = b1 * m[k] + (1 - b1) * g[k] * scale
            v[k] = b2 * v[k] + (1 - b2) * (g[k] * scale) ** 2
            step = (m[k] / (1 - b1 ** (n + 1))) / (np.sqrt(v[k] / (1 - b2 ** (n + 1))) + eps)
            p[k] = p[k] - rate(n) * (step + decay * mask[k] * p[k])
    return p


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw_equals_a_float64_oracle(clip):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "scale": np.ones((2, 3), np.float32)}
    mask = {"kernel": True, "scale": False}  # a stacked norm has two axes and must not be decayed
    grads = [{k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()} for _ in range(5)]
    schedule = make_schedule("cosine", peak=1e-2, total_steps=5, warmup_steps=2)
    optimizer = make_optimizer(schedule, weight_decay=0.1, clip_norm=clip, decay_mask=mask)
    state, p = optimizer.init(params), params
    for g in grads:
        updates, state = optimizer.update(g, state, p)
        p = optax.apply_updates(p, updates)
    expected = adamw_oracle(
        params,
        lambda n: grads[n],
        5,
        rate=lambda n: float(schedule(n)),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        decay=0.1,
        clip=clip,
        mask=mask,
    )
    for k in p:
        np.testing.assert_allclose(p[k], expected[k], rtol=2e-6)


def test_decay_moves_masked_leaves_only():
    params = jax.tree.map(jnp.asarray, toy_params())
    optimizer = make_optimizer(0.1, weight_decay=0.5, decay_mask=toy_mask())
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert not np.any(updates["layers"]["norm"]["scale"])
    np.testing.assert_allclose(updates["head"]["kernel"], -0.05 * params["head"]["kernel"], rtol=1e-6)


def test_bfloat16_parameters_have_float32_moments():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), toy_params())
    optimizer = make_optimizer(1e-2, decay_mask=toy_mask())
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = optimizer.update(grads, state, params)
    kinds = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
    assert kinds == {jnp.dtype("float32")}
    assert jax.tree.leaves(optax.apply_updates(params, updates))[0].dtype == jnp.bfloat16
