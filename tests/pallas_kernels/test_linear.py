import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fusejax.parallel.hlo import dot_flops, parse_program
from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss
from pallas_kernels.fused_softmax_kl import tiling
from tests.pallas_kernels import oracle
from tests.pallas_kernels.compiled import quick_jit
from tests.pallas_kernels.test_kernels import MOSAIC_GPU
from tests.pallas_kernels.test_oracle import OPTIONS

VALUE = {"rtol": 5e-6, "atol": 5e-6}
GRADIENT = {"rtol": 1e-5, "atol": 5e-6}


class Problem:
    """Hidden states, head and targets whose logits are an oracle case's."""

    def __init__(self, seed=0, *, width=8, vocab=23, tokens=9, **shape):
        rng = np.random.default_rng(seed + 100)
        self.hidden = rng.normal(size=(tokens, width)).astype(np.float32)
        self.head = (0.7 * rng.normal(size=(width, vocab))).astype(np.float32)
        case = oracle.random_case(seed, tokens=tokens, vocab=vocab, **shape)
        self.case = case._replace(logits=self.hidden.astype(np.float64) @ self.head)
        mixed = case.logprobs.shape[1]
        self.clm_weights = rng.random(tokens).astype(np.float32)
        self.kl_weights = (rng.random((tokens, mixed)) * (rng.random((tokens, mixed)) > 0.3)).astype(np.float32)

    def targets(self):
        c = self.case
        return tuple(jnp.asarray(x) for x in (c.labels, c.ids, c.logprobs, c.rest))

    def one_pass(self, hidden, head, **options):
        weights = jnp.asarray(self.clm_weights), jnp.asarray(self.kl_weights)
        return linear_fusion_loss(
            hidden, head, *self.targets(), *weights, event=jnp.asarray(self.case.event), **options
        )

    def recompute(self, hidden, head, **options):
        mask = jnp.ones(len(self.case.labels))
        out = linear_fused_softmax_kl(
            hidden, head, *self.targets(), mask, event=jnp.asarray(self.case.event), **options
        )
        loss = (out.clm * self.clm_weights).sum() + (out.kl * self.kl_weights).sum()
        return loss, out

    def expected(self, **options):
        clm, kl, dclm, dkl = oracle.losses(self.case, **options)
        dlogits = dclm * self.clm_weights[:, None] + (dkl * self.kl_weights[..., None]).sum(1)
        loss = (clm * self.clm_weights).sum() + (kl * self.kl_weights).sum()
        return loss, clm, kl, dlogits @ self.head.T, self.hidden.T @ dlogits


def _check(problem, call, **options):
    ours = ("implementation", "chunk", "head_layout", "interpret")
    oracle_options = {k: v for k, v in options.items() if k not in ours}
    loss, clm, kl, dhidden, dhead = problem.expected(**oracle_options)
    head = problem.head if options.get("head_layout", "dv") == "dv" else problem.head.T
    call = quick_jit(jax.value_and_grad(functools.partial(call, **options), (0, 1), has_aux=True))
    (got, aux), (dh, dw) = call(jnp.asarray(problem.hidden), jnp.asarray(head))
    dw = dw if options.get("head_layout", "dv") == "dv" else dw.T
    np.testing.assert_allclose(got, loss, **VALUE)
    np.testing.assert_allclose(aux.clm + options.get("z_loss_weight", 0.0) * aux.z_loss, clm, **VALUE)
    used = problem.kl_weights != 0
    np.testing.assert_allclose(np.asarray(aux.kl)[used], kl[used], **VALUE)
    np.testing.assert_allclose(dh, dhidden, **GRADIENT)
    np.testing.assert_allclose(dw, dhead, **GRADIENT)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_pass_equals_oracle(options):
    problem = Problem(1, mixed=2, members=3)
    _check(problem, problem.one_pass, chunk=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0},
        {"temperature": 0.5, "softcap": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_recompute_and_reference_equal_oracle(options, implementation):
    problem = Problem(2, mixed=2, members=2)
    _check(problem, problem.recompute, chunk=4, implementation=implementation, **options)
    _check(problem, problem.one_pass, chunk=5, implementation=implementation, **options)


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("tpu", {"temperature": 0.5}),
        ("tpu", {"divergence": "jsd", "temperature": 2.0, "softcap": 2.0}),
        pytest.param("mosaic_gpu", {"divergence": "kl", "temperature": 2.0}, marks=MOSAIC_GPU),
        pytest.param("mosaic_gpu", {"divergence": "reverse_kl", "temperature": 0.5}, marks=MOSAIC_GPU),
    ],
    ids=str,
)
def test_kernels_through_the_losses_equal_oracle(implementation, options):
    """Interpreted; the vocabulary fits the copy engine's rule."""
    problem = Problem(18, vocab=24, mixed=2, members=2)
    how = {"implementation": implementation, "interpret": True, "chunk": 5}
    _check(problem, problem.one_pass if "softcap" in options else problem.recompute, **how, **options)


@pytest.mark.parametrize(
    ("call", "layout", "chunk"),
    [("one_pass", "vd", None), ("recompute", "vd", 1), ("one_pass", "dv", 9), ("recompute", "dv", 64)],
)
def test_layouts_and_chunks(call, layout, chunk):
    problem = Problem(3)
    _check(problem, getattr(problem, call), chunk=chunk, head_layout=layout)


@pytest.mark.parametrize("layout", ["dv", "vd"])
def test_cpu_blocks_with_remainders_equal_oracle(layout, monkeypatch):
    """The loops over rows and columns that large arrays take on CPU: 2 blocks and a rest of each."""
    monkeypatch.setattr(tiling, "CPU_SMALL", 0)
    monkeypatch.setattr(tiling, "_CPU_ROWS_BYTES", 3 * 4 * 150)
    monkeypatch.setattr(tiling, "_CPU_HEAD_BLOCK_BYTES", 4 * 8 * 64)
    problem = Problem(12, tokens=13, vocab=150, members=2)
    options = {"temperature": 2.0} if layout == "dv" else {"softcap": 2.0, "temperature": 3.0}
    _check(problem, problem.one_pass, chunk=8, head_layout=layout, **options)


@pytest.mark.parametrize(
    ("implementation", "options"),
    [
        ("xla", {"softcap": 2.0, "temperature": 2.0}),
        ("xla", {"valid_vocab": 21}),
        ("reference", {"softcap": 2.0}),
    ],
    ids=str,
)
def test_z_loss_equals_oracle(implementation, options):
    problem = Problem(13, vocab=options.get("valid_vocab", 23))
    if "valid_vocab" in options:
        problem.head = np.pad(problem.head, [(0, 0), (0, 3)])
        problem.case = problem.case._replace(logits=problem.hidden.astype(np.float64) @ problem.head)
    _check(problem, problem.one_pass, chunk=4, z_loss_weight=0.3, implementation=implementation, **options)


def test_z_loss_is_a_loss_of_its_own_where_cotangents_are_free():
    problem = Problem(14)

    def loss(hidden, head):
        out = problem.recompute(hidden, head, chunk=4, softcap=3.0)[1]
        return (out.clm * problem.clm_weights).sum() + (0.3 * out.z_loss * problem.clm_weights).sum()

    problem.kl_weights[:] = 0
    value, gradients = quick_jit(jax.value_and_grad(loss, (0, 1)))(problem.hidden, problem.head)
    expected, _, _, *both = problem.expected(softcap=3.0, z_loss_weight=0.3)
    np.testing.assert_allclose(value, expected, **VALUE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **GRADIENT), list(gradients), both)


def test_z_loss_of_large_logits_and_masked_positions():
    problem = Problem(15)
    problem.hidden *= 1e3
    problem.clm_weights[:4] = 0
    problem.hidden[0] = np.nan
    call = quick_jit(jax.value_and_grad(functools.partial(problem.one_pass, z_loss_weight=1e-4), has_aux=True))
    (_, out), gradient = call(problem.hidden, problem.head)
    logits = problem.hidden.astype(np.float64) @ problem.head
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    np.testing.assert_allclose(out.z_loss[4:], lse[4:] ** 2, rtol=1e-5)
    assert (np.asarray(out.z_loss[:4]) == 0).all() and np.isfinite(gradient[1:]).all()


def test_padded_vocabulary_with_small_logits():
    problem = Problem(4, vocab=21)
    padded = np.concatenate([problem.head, np.zeros((8, 4), np.float32)], axis=1)  # a zero row is a logit of 0
    run = quick_jit(jax.value_and_grad(functools.partial(problem.one_pass, valid_vocab=21), (0, 1), has_aux=True))
    (a, _), (dh, dw) = run(problem.hidden, problem.head)
    (b, _), (dh2, dw2) = run(problem.hidden, padded)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(dh, dh2, atol=1e-6)
    np.testing.assert_allclose(dw, dw2[:, :21], atol=1e-6)
    assert (np.asarray(dw2[:, 21:]) == 0).all()


@pytest.mark.parametrize(
    "options", [{"temperature": 2.0, "scale_by_temperature_squared": True}, {"softcap": 2.0}], ids=str
)
def test_loss_and_gradient_agree_by_finite_differences(options):
    problem = Problem(5, mixed=1, members=2)
    call = jax.jit(lambda h, w: problem.one_pass(h, w, **options)[0])
    check_grads(call, (problem.hidden, problem.head), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_temperature_squared_scales_value_and_gradient_alike():
    problem = Problem(6)
    problem.clm_weights[:] = 0

    def run(**options):
        call = functools.partial(problem.one_pass, temperature=3.0, **options)
        return quick_jit(jax.value_and_grad(lambda h: call(h, problem.head)[0]))(problem.hidden)

    plain, scaled = run(), run(scale_by_temperature_squared=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(9 * a, b, rtol=1e-5, atol=1e-7), plain, scaled)


@pytest.mark.parametrize(("poison", "implementation"), [(np.nan, "xla"), (np.inf, "xla"), (np.nan, "reference")])
def test_masked_positions_change_nothing_bitwise(poison, implementation):
    problem = Problem(7)
    problem.clm_weights[[2, 5]] = 0
    problem.kl_weights[[2, 5]] = 0

    def run():
        call = functools.partial(problem.one_pass, chunk=4, implementation=implementation)
        call = quick_jit(jax.value_and_grad(call, (0, 1), has_aux=True))
        return call(jnp.asarray(problem.hidden), jnp.asarray(problem.head))

    clean = run()
    problem.hidden[[2, 5]] = poison
    case = problem.case
    labels, logprobs, rest = case.labels.copy(), case.logprobs.copy(), case.rest.copy()
    labels[2], logprobs[[2, 5]], rest[[2, 5]] = -100, np.nan, np.nan
    problem.case = case._replace(labels=labels, logprobs=logprobs, rest=rest)
    jax.tree.map(np.testing.assert_array_equal, clean, run())
    assert (np.asarray(clean[1][0])[[2, 5]] == 0).all()


def test_no_gradient_to_targets():
    problem = Problem(8)
    labels, ids, logprobs, rest = problem.targets()

    def loss(logprobs, rest, implementation):
        weights = jnp.asarray(problem.clm_weights), jnp.asarray(problem.kl_weights)
        out = linear_fusion_loss(
            problem.hidden, problem.head, labels, ids, logprobs, rest, *weights, implementation=implementation
        )
        return out[0]

    for implementation in ("xla", "reference"):
        for gradient in quick_jit(jax.grad(loss, (0, 1)), static_argnums=2)(logprobs, rest, implementation):
            assert (np.asarray(gradient) == 0).all()


def test_bfloat16_inputs():
    problem = Problem(9, tokens=64, width=32, vocab=300, k=8)
    hidden, head = jnp.asarray(problem.hidden, jnp.bfloat16), jnp.asarray(problem.head, jnp.bfloat16)
    problem.hidden, problem.head = np.asarray(hidden, np.float32), np.asarray(head, np.float32)
    problem.case = problem.case._replace(logits=problem.hidden.astype(np.float64) @ problem.head)
    loss, _, _, dhidden, dhead = problem.expected()
    (got, _), grads = quick_jit(jax.value_and_grad(problem.one_pass, (0, 1), has_aux=True))(hidden, head)
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for gradient, expected in zip(grads, (dhidden, dhead), strict=True):
        error = np.asarray(gradient, np.float64) - expected
        assert np.linalg.norm(error) < 5e-3 * np.linalg.norm(expected)


def test_single_distribution_has_no_mixture_axis():
    problem = Problem(10)
    labels, ids, logprobs, rest = problem.targets()
    args = problem.hidden, problem.head, labels, ids, logprobs[:, 0], rest[:, 0], jnp.ones(9), problem.case.event
    out = quick_jit(lambda *a: linear_fused_softmax_kl(*a[:-1], event=a[-1]))(*args)
    assert out.kl.shape == (9,)
    np.testing.assert_allclose(out.kl, problem.expected()[2][:, 0], **VALUE)


def test_the_heads_gradient_accumulates_in_float32():
    """Accumulated in bfloat16 over 128 chunks it would be off by a hundredth (VeOmni)."""
    problem = Problem(16, tokens=128, width=16, vocab=64)
    hidden, head = jnp.asarray(problem.hidden, jnp.bfloat16), jnp.asarray(problem.head, jnp.bfloat16)

    def run(chunk):
        call = functools.partial(problem.one_pass, chunk=chunk)
        return np.asarray(quick_jit(jax.grad(lambda w: call(hidden, w)[0]))(head), np.float64)

    many, one = run(1), run(128)
    assert np.linalg.norm(many - one) < 5e-4 * np.linalg.norm(one)


@pytest.mark.parametrize(("call", "flops"), [(linear_fusion_loss, 6), (linear_fused_softmax_kl, 8)])
def test_operations_of_the_matmuls(call, flops):
    problem = Problem(17, tokens=64, width=16, vocab=200)
    weights = (jnp.ones(64), jnp.ones((64, 1))) if flops == 6 else (jnp.ones(64),)

    def loss(hidden, head):
        out = call(hidden, head, *problem.targets(), *weights, temperature=2.0)
        return out[0] if flops == 6 else out.clm.sum() + out.kl.sum()

    compiled = quick_jit(jax.value_and_grad(loss, (0, 1))).lower(problem.hidden, problem.head).compile()
    assert dot_flops(parse_program(compiled.as_text())) == flops * 64 * 16 * 200
    assert tiling.linear_flops(64, 16, 200, recompute=flops == 8) == flops * 64 * 16 * 200


@pytest.mark.parametrize(("call", "layout"), [("one_pass", "dv"), ("one_pass", "vd"), ("recompute", "dv")])
def test_no_logits_array_in_the_compiled_program(call, layout):
    tokens, vocab = 512, 769
    problem = Problem(11, tokens=tokens, vocab=vocab, width=16)
    head = jnp.asarray(problem.head if layout == "dv" else problem.head.T)
    loss = functools.partial(getattr(problem, call), head_layout=layout, temperature=2.0)
    compiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(jnp.asarray(problem.hidden), head).compile()
    )
    shapes = [
        tuple(int(n) for n in match.split(",")) for match in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    ]
    assert max(s[0] for s in shapes if len(s) == 2 and s[1] == vocab) <= 128  # the chunk's logits are there
    assert max(np.prod(s) for s in shapes) < tokens * vocab


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "js"}, "reverse_kl, jsd"),
        ({"tail": "symmetric"}, "bucket, renormalize, zero"),
        ({"divergence": "reverse_kl", "tail": "zero"}, "tail='bucket'"),
        ({"temperature": 0.0}, "temperature"),
        ({"head_layout": "tv"}, "head_layout"),
        ({"chunk": 0}, "chunk"),
        ({"implementation": "triton"}, "reference, xla"),
        ({"logits_dtype": "float16"}, "logits_dtype"),
        ({"z_loss_weight": -1.0}, "z_loss_weight"),
        ({"head_layout": "vd"}, "expected hidden"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    problem = Problem(0)
    for call in (problem.one_pass, problem.recompute):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(problem.hidden, problem.head, **options)
