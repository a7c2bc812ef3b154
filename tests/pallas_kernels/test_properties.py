"""What must hold of the fused losses and of every kernel, whatever the numbers; each program is compiled once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss, lse_gather
from tests.pallas_kernels import oracle
from tests.pallas_kernels.compiled import quick_jit
from tests.pallas_kernels.test_kernels import MOSAIC_GPU

FAST = settings(max_examples=10, deadline=None)
SEED = st.integers(0, 10**6)
TOKENS, WIDTH, VOCAB = 9, 6, 24
SAME = {"rtol": 2e-5, "atol": 3e-6}


def problem(seed):
    """Returns (hidden, head, labels, ids, logprobs [T, 1, K], rest [T, 1], clm weights, kl weights)."""
    rng = np.random.default_rng(seed)
    case = oracle.random_case(seed, tokens=TOKENS, vocab=VOCAB)
    arrays = rng.normal(size=(TOKENS, WIDTH)), 0.7 * rng.normal(size=(WIDTH, VOCAB))
    weights = rng.random(TOKENS), rng.random((TOKENS, 1)) * (rng.random((TOKENS, 1)) > 0.3)
    return tuple(
        np.asarray(x, np.int32 if np.issubdtype(np.asarray(x).dtype, np.integer) else np.float32)
        for x in (*arrays, case.labels, case.ids, case.logprobs, case.rest, *weights)
    )


def loss_and_gradients(hidden, head, *rest, chunk=4, axis=None):
    call = functools.partial(linear_fusion_loss, temperature=2.0, chunk=chunk, vocab_axis=axis)
    return jax.value_and_grad(lambda h, w: call(h, w, *rest)[0], (0, 1))(hidden, head)


one_pass = quick_jit(loss_and_gradients, static_argnames=("chunk", "axis"))


@quick_jit
def recompute(hidden, head, labels, ids, logprobs, rest, clm_weights, kl_weights):
    def loss(hidden, head):
        ones = jnp.ones(TOKENS)
        out = linear_fused_softmax_kl(hidden, head, labels, ids, logprobs, rest, ones, temperature=2.0, chunk=4)
        return (out.clm * clm_weights).sum() + (out.kl * kl_weights).sum()

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **SAME), a, b)


@FAST
@given(seed=SEED)
def test_order_of_the_vocabulary(seed):
    hidden, head, labels, ids, *rest = problem(seed)
    new = np.random.default_rng(seed).permutation(VOCAB)  # token new[v] stands where v stood
    place = np.argsort(new).astype(np.int32)
    moved = np.where(ids >= 0, place[np.maximum(ids, 0)], ids)
    loss, (dhidden, dhead) = one_pass(hidden, head[:, new], place[labels], moved, *rest)
    expected, (dhidden2, dhead2) = one_pass(hidden, head, labels, ids, *rest)
    same((loss, dhidden, dhead), (expected, dhidden2, dhead2[:, new]))


@FAST
@given(seed=SEED, chunk=st.sampled_from([1, 5, 16]))
def test_size_of_the_chunks(seed, chunk):
    same(one_pass(*problem(seed), chunk=chunk), one_pass(*problem(seed)))


@FAST
@given(seed=SEED)
def test_gradients_in_the_forward_pass_are_those_of_the_backward_pass(seed):
    same(one_pass(*problem(seed)), recompute(*problem(seed)))


@FAST
@given(seed=SEED, factor=st.floats(0.25, 4.0))
def test_the_loss_is_linear_in_its_weights(seed, factor):
    *rest, clm, kl = problem(seed)
    scaled = one_pass(*rest, np.float32(factor) * clm, np.float32(factor) * kl)
    same(scaled, jax.tree.map(lambda x: factor * x, one_pass(*rest, clm, kl)))


@FAST
@given(seed=SEED)
def test_every_row_of_the_heads_gradient_sums_to_zero(seed):
    *rest, clm, kl = problem(seed)
    np.testing.assert_allclose(one_pass(*rest, clm, kl)[1][1].sum(axis=1), 0.0, atol=1e-5)


@functools.partial(quick_jit, static_argnames="implementation")
def statistics(logits, ids, implementation):
    call = functools.partial(lse_gather, temperatures=(1.0, 2.0), implementation=implementation, interpret=True)
    return jax.value_and_grad(lambda x: call(x, ids).lse.sum() + 0.5 * call(x, ids).z.sum())(logits)


@pytest.mark.parametrize("implementation", ["xla", "tpu", pytest.param("mosaic_gpu", marks=MOSAIC_GPU)])
@settings(max_examples=5, deadline=None)
@given(seed=SEED, shift=st.floats(-30, 30), scale=st.floats(0.1, 20))
def test_kernels_shift_with_their_rows_and_agree_with_the_definition(implementation, seed, shift, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(8, 200))).astype(np.float32)
    ids = rng.integers(-2, 202, (8, 3)).astype(np.int32)
    expected, slope = statistics(logits, ids, "reference")
    for moved in (0.0, np.float32(shift)):
        real = ((ids >= 0) & (ids < 200)).sum()
        value, gradient = statistics(logits + moved, ids, implementation)
        np.testing.assert_allclose(value, expected + moved * (8 * 1.5 + 0.5 * real), rtol=1e-4, atol=2e-2)
        np.testing.assert_allclose(gradient, slope, atol=2e-4)


def test_a_kernel_inside_a_shard_map_agrees_with_the_definition():
    """Interpreted, over four shards of which the last holds padding only."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(9, 256)).astype(np.float32), rng.integers(-2, 258, (9, 5)).astype(np.int32)

    def run(logits, ids, implementation, axis=None):
        call = functools.partial(lse_gather, temperatures=(1.0, 2.0), valid_vocab=190, implementation=implementation)
        return jax.value_and_grad(lambda x: sum(y.sum() for y in call(x, ids, vocab_axis=axis, interpret=True)))(logits)

    split = P(None, "tensor")
    call = functools.partial(run, implementation="tpu", axis="tensor")
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(split, P()), out_specs=(P(), split), check_vma=False)
    same(quick_jit(mapped)(logits, ids), run(logits, ids, "reference"))


def test_collectives_of_a_split_vocabulary():
    """Statistics and the hidden states' gradient, and nothing of the vocabulary's size."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    hidden, head, *rest = problem(3)
    split = P(None, "tensor")
    call = functools.partial(loss_and_gradients, axis="tensor", chunk=TOKENS)
    specs = {"in_specs": (P(), split, *[P()] * len(rest)), "out_specs": (P(), (P(), split))}
    mapped = jax.jit(jax.shard_map(call, mesh=mesh, **specs, check_vma=False))
    text = mapped.lower(hidden, jax.device_put(head, jax.NamedSharding(mesh, split)), *rest).as_text()
    assert "all_gather" not in text and "all_to_all" not in text
    sizes = re.findall(r"all_reduce.*?\}\) : \(tensor<([\dx]+)xf32>", text, re.DOTALL)
    entries = rest[1].shape[1] + 1  # the label and the ids
    assert sorted(sizes) == sorted([f"{TOKENS}", f"{TOKENS}x2", f"{TOKENS}x{entries}", f"{TOKENS}x{WIDTH}"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("ways", [2, 8])
def test_vocabulary_over_a_mesh_axis(axis_type, ways):
    """`linear_fusion_loss` called inside a caller's own shard_map, each device holding a part of the head."""
    mesh = jax.make_mesh((ways,), ("tensor",), axis_types=(axis_type,))
    hidden, head, *rest = problem(3)
    expected = one_pass(hidden, head, *rest)
    split = P(None, "tensor")
    call = jax.shard_map(
        functools.partial(loss_and_gradients, axis="tensor"),
        mesh=mesh,
        in_specs=(P(), split, *[P()] * len(rest)),
        out_specs=(P(), (P(), split)),
        check_vma=False,
    )
    placed = jax.device_put(head, jax.NamedSharding(mesh, split))
    compiled = quick_jit(call).lower(hidden, placed, *rest).compile()
    assert "all-gather" not in compiled.as_text()
    same(compiled(hidden, placed, *rest), expected)
