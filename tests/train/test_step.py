import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.train.optimizer import make_optimizer
from fusejax.train.step import init_train_state, make_train_step

from .toy import toy_loss, toy_mask, toy_params, toy_records


def batches(count=3, rows=8):
    loader = FusionLoader(toy_records(60), batch_size=rows, seq_len=12)
    return [loader.batch(i) for i in range(count)]


def optimizer():
    return make_optimizer(3e-2, decay_mask=toy_mask())


def run(step, state, data):
    metrics = []
    for batch in data:
        state, m = step(state, batch)
        metrics.append(m)
    return state, metrics


def reference(data=None, accumulation=1):
    opt = optimizer()
    step = jax.jit(make_train_step(toy_loss, opt, accumulation=accumulation))
    return run(step, init_train_state(toy_params(), opt), batches() if data is None else data)


def close(a, b, rtol=2e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_equals_the_big_batch(accumulation):
    whole, parts = reference(), reference(accumulation=accumulation)
    close(whole[0].params, parts[0].params)
    close(whole[1], parts[1])


def test_gradient_is_the_mean_over_trained_tokens():
    # A plain SGD step makes the gradient visible; numerically differentiated in float64.
    batch = batches(1)[0]
    params = toy_params()
    (_, _), grads = jax.value_and_grad(toy_loss, has_aux=True)(params, batch, batch.mask.sum())

    def loss64(kernel):
        x = np.tanh(params["embed"]["embedding"].astype(np.float64)[batch.tokens])
        z = x @ kernel
        lse = np.log(np.exp(z).sum(-1))
        nats = lse - np.take_along_axis(z, batch.labels[..., None], -1)[..., 0]
        return nats[batch.mask > 0].mean()

    kernel = params["head"]["kernel"].astype(np.float64)
    for at in [(0, 0), (3, 7), (7, 15)]:
        up, down = kernel.copy(), kernel.copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        slope = (loss64(up) - loss64(down)) / 2e-5
        assert float(grads["head"]["kernel"][at]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_metrics_and_step_count():
    data = batches()
    state, metrics = reference(data)
    assert int(state.step) == 3
    for batch, m in zip(data, metrics, strict=True):
        assert float(m["trained_tokens"]) == batch.mask.sum()
        assert float(m["real_tokens"]) == (batch.segment_ids > 0).sum()
        assert float(m["skipped"]) == 0 and float(m["loss"]) == pytest.approx(float(m["clm_nats"]))
    assert float(metrics[2]["loss"]) < float(metrics[0]["loss"])


@pytest.mark.parametrize(
    ("shape", "kind", "accumulation"),
    [
        ((8, 1), AxisType.Auto, 1),
        ((1, 8), AxisType.Auto, 2),
        ((2, 4), AxisType.Auto, 1),
        ((2, 4), AxisType.Explicit, 1),
        ((2, 4), AxisType.Explicit, 2),
    ],
)
def test_sharded_steps_equal_one_device(shape, kind, accumulation):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(kind,) * 2)
    specs = {
        "embed": {"embedding": P(None, "fsdp")},
        "layers": {"norm": {"scale": P()}},
        "head": {"kernel": P("fsdp", None)},
    }
    if kind is AxisType.Explicit:
        # An explicit mesh makes the model say where it gathers, which is not this test's subject.
        specs = jax.tree.map(lambda _: P(), specs, is_leaf=lambda x: isinstance(x, P))
    opt = optimizer()
    data = batches(rows=16)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), toy_params(), specs)
        step = jax.jit(make_train_step(toy_loss, opt, accumulation=accumulation))
        state, metrics = run(step, init_train_state(params, opt), [jax.device_put(b, rows) for b in data])
    expected = reference(data)
    close(state.params, expected[0].params)
    close(metrics, expected[1])


def test_micro_batches_move_no_row_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    opt = optimizer()
    state = jax.device_put(init_train_state(toy_params(), opt), NamedSharding(mesh, P()))
    batch = jax.device_put(batches(1, rows=16)[0], NamedSharding(mesh, P("data")))
    text = jax.jit(make_train_step(toy_loss, opt, accumulation=2)).lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    opt = optimizer()
    step = jax.jit(make_train_step(toy_loss, opt))
    state, _ = run(step, init_train_state(toy_params(), opt), batches(1))
    poisoned = batches(2)[1]
    poisoned.mask[0, 0] = bad
    after, metrics = step(state, poisoned)
    assert float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_batch_without_a_trained_token_is_finite():
    empty = batches(1)[0]
    empty.mask[:] = 0
    _, metrics = reference([empty])
    assert float(metrics[0]["loss"]) == 0 and float(metrics[0]["skipped"]) == 0


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(InputError, match="3 micro-batches"):
        reference(accumulation=3)
    with pytest.raises(InputError, match="accumulation"):
        make_train_step(toy_loss, optimizer(), accumulation=0)


def test_a_mean_without_its_count_is_refused():
    def loss_fn(*args):
        return toy_loss(*args)[0], {"fusion_nats": jnp.float32(1)}

    step = make_train_step(loss_fn, optimizer(), accumulation=2)
    with pytest.raises(InputError, match="fusion_nats"):
        step(init_train_state(toy_params(), optimizer()), batches(1)[0])


def test_state_can_be_abstract():
    abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer()), toy_params())
    assert abstract.step.dtype == jnp.int32
