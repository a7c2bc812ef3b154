"""Moments and parameters that are kept in bfloat16 between steps, and moments in 8 bits."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fusejax.config.stages import MemoryConfig
from fusejax.errors import InputError
from fusejax.train.loop import train
from fusejax.train.optimizer import make_optimizer, make_schedule
from fusejax.train.step import full_params, init_train_state
from fusejax.types import MasterState

from .test_loop import SCHEDULE, loader, losses, on_mesh, same
from .toy import toy_loss, toy_mask, toy_params

NARROW = {"moments_dtype": "bfloat16", "param_dtype": "bfloat16"}
CODED = {"moments_dtype": "int8"}
KINDS = ({"moments_dtype": "bfloat16"}, {"param_dtype": "bfloat16"}, NARROW, CODED)
SAVED = pytest.mark.parametrize("kept", [NARROW, CODED], ids=["bfloat16", "int8"])


def run(kept, steps=20, **options):
    optimizer = make_optimizer(SCHEDULE, decay_mask=toy_mask(), **kept)
    return train(toy_params(), loader(), loss_fn=toy_loss, optimizer=optimizer, total_steps=steps, **options)


def quadratic(kept, steps=100, *, rate=1e-2, b2=0.95, size=512):
    """Returns the params after AdamW on noisy gradients of |x - goal|^2 / 2, at full precision."""
    rng = np.random.default_rng(0)
    goal = rng.normal(size=(4, size)).astype(np.float32)
    noise = jnp.asarray(rng.normal(size=(steps, 4, size)), jnp.float32)
    schedule = make_schedule("cosine", peak=rate, total_steps=steps, warmup_steps=5)
    optimizer = make_optimizer(schedule, b2=b2, weight_decay=0.0, clip_norm=None, **kept)

    @jax.jit
    def step(state, noise):
        grads = {"x": state.params["x"].astype(jnp.float32) - goal + noise}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    state = init_train_state({"x": jnp.zeros((4, size))}, optimizer)
    for n in range(steps):
        state = step(state, noise[n])
    return np.asarray(full_params(state)["x"]), state


@pytest.mark.parametrize("b2", [0.95, 0.999])
@pytest.mark.parametrize("kept", KINDS, ids=str)
def test_a_hundred_steps_stay_near_float32(kept, b2):
    expected, _ = quadratic({}, b2=b2)
    got, _ = quadratic(kept, b2=b2)
    assert np.linalg.norm(got - expected) < (0.04 if kept == CODED else 0.01) * np.linalg.norm(expected)
    assert np.any(got != expected)


def test_moments_that_shrink_slower_than_bfloat16_resolves_still_shrink():
    optimizer = make_optimizer(1e-3, b2=0.999, weight_decay=0, clip_norm=None, moments_dtype="bfloat16")
    params = {"x": jnp.zeros(4096)}
    state = optimizer.init(params)
    grads = {"x": jnp.ones(4096)}
    for _ in range(200):
        _, state = optimizer.update(grads, state, params)
        grads = {"x": jnp.zeros(4096)}
    second = np.asarray(state[0].nu["x"], np.float64)
    assert second.mean() == pytest.approx(0.001 * 0.999**199, rel=2e-3)  # to the nearest, it would be 0.001
    assert state[0].nu["x"].dtype == jnp.bfloat16


def test_steps_below_the_resolution_of_bfloat16_add_up():
    optimizer = make_optimizer(1e-5, weight_decay=0, clip_norm=None, param_dtype="bfloat16")
    state = init_train_state({"x": jnp.ones(8)}, optimizer)
    grads = {"x": jnp.ones(8, jnp.bfloat16)}

    @jax.jit
    def step(state):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    for _ in range(400):
        state = step(state)
        same(state.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.opt_state.master))
    np.testing.assert_allclose(full_params(state)["x"], 1 - 400e-5, rtol=1e-4)
    assert float(state.params["x"][0]) == 1 - 2**-8


@pytest.mark.parametrize("kept", [{}, *KINDS], ids=str)
def test_the_state_takes_the_bytes_that_are_stated(kept):
    params = jax.tree.map(jnp.asarray, toy_params())
    state = init_train_state(params, make_optimizer(1e-3, decay_mask=toy_mask(), **kept))
    held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    rows = sum(2 * x.size // x.shape[-1] for x in jax.tree.leaves(params)) if kept == CODED else 0
    assert held == MemoryConfig(**kept).state_bytes * sum(x.size for x in jax.tree.leaves(params)) + rows
    same(full_params(state), params)


def test_the_default_is_optax_adamw_bit_for_bit():
    params = jax.tree.map(jnp.asarray, toy_params())
    parts = (optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8))
    decay = optax.add_decayed_weights(0.1, mask=toy_mask())
    expected = optax.chain(*parts, decay, optax.scale_by_learning_rate(SCHEDULE))
    given = make_optimizer(SCHEDULE, decay_mask=toy_mask())
    states = expected.init(params), given.init(params)
    for _ in range(3):
        first, second = expected.update(params, states[0], params), given.update(params, states[1], params)
        same(first, second)
        states = first[1], second[1]


@SAVED
def test_resuming_is_bitwise(tmp_path, kept):
    whole = run(kept)
    run(kept, 10, checkpoint_dir=tmp_path)
    resumed = run(kept, checkpoint_dir=tmp_path)
    assert resumed.start_step == 10 and isinstance(whole.state.opt_state, MasterState) == (kept is NARROW)
    same(resumed.state, whole.state)
    assert losses(whole)[-1] < losses(whole)[0]


def test_codes_that_eight_devices_saved_one_and_two_resume(tmp_path):
    whole = run(CODED, 8, **on_mesh())
    moments = whole.state.opt_state[1]
    specs = [x["head"]["kernel"].sharding.spec for x in moments[1:]]
    assert specs == [P("fsdp", None), P("fsdp", None), P("fsdp")]
    run(CODED, 4, checkpoint_dir=tmp_path / "8", **on_mesh())
    for count in (1, 2):
        shutil.copytree(tmp_path / "8", tmp_path / str(count))
        where = on_mesh(shape=(1, count)) if count > 1 else {}
        rest = run(CODED, 8, checkpoint_dir=tmp_path / str(count), **where)
        assert rest.start_step == 4
        np.testing.assert_allclose(losses(rest), losses(whole)[4:], rtol=2e-3)


@pytest.mark.slow
def test_codes_on_an_explicit_mesh():
    one, eight = run(CODED, 4), run(CODED, 4, **on_mesh(AxisType.Explicit))
    np.testing.assert_allclose(losses(eight), losses(one), rtol=2e-3)


def test_a_mesh_of_eight_trains_alike():
    one, eight = run(NARROW), run(NARROW, **on_mesh())
    np.testing.assert_allclose(losses(eight), losses(one), rtol=2e-3)
    spec = {"params": eight.state.params, "master": eight.state.opt_state.master}
    spec |= {"mu": eight.state.opt_state.inner[1].mu, "nu": eight.state.opt_state.inner[1].nu}
    for name, tree in spec.items():
        assert tree["head"]["kernel"].sharding.spec == P("fsdp", None), name


def test_unknown_dtypes_are_refused():
    with pytest.raises(InputError, match="moments_dtype must be one of float32, bfloat16, int8, got 'int4'"):
        make_optimizer(1e-3, weight_decay=0, moments_dtype="int4")
    with pytest.raises(InputError, match="param_dtype must be one of float32, bfloat16, got 'int8'"):
        make_optimizer(1e-3, weight_decay=0, param_dtype="int8")
    with pytest.raises(InputError, match=r"int8 needs b1\^2 < b2"):
        make_optimizer(1e-3, weight_decay=0, moments_dtype="int8", b1=0.9, b2=0.8)
