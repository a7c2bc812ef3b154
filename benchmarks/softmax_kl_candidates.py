"""The ways to compute the fused CLM and KL loss that `fused_softmax_kl.py` measures, each built when asked for.

`candidates` returns name -> a function that builds a `Candidate`. Building may raise: `Unavailable` where a library is
not here, anything else where it does not compile or has no memory. Those of this project are named "ours ...".
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl import event_divergence
from pallas_kernels.fused_softmax_kl.dispatch import choose

TAU, CLM_WEIGHT, KL_WEIGHT = 2.0, 0.9, 0.1
ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32


class Unavailable(Exception):
    """A library that is not here, or not built for this device."""


class Candidate(NamedTuple):
    """Loss and gradients, ready to run."""

    run: Callable[[], Any]  # starts it
    wait: Callable[[Any], float]  # waits for what `run` returned; the loss
    gradients: Callable[[Any], tuple] | None  # of what `run` returned, as JAX arrays
    facts: dict[str, Any]  # what the compiler says, and which backend was chosen


def draw(tokens: int, vocab: int, k: int) -> tuple[jax.Array, ...]:
    """Returns (labels [T], ids [T, K], logprobs [T, K], rest [T]); ids distinct within a row."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(k + 1), tokens).astype(np.float32)
    ids = (rng.integers(0, vocab, (tokens, 1)) + np.arange(k) * (vocab // (k + 1))) % vocab
    labels = rng.integers(0, vocab, tokens)
    return jnp.asarray(labels, jnp.int32), jnp.asarray(ids, jnp.int32), jnp.log(p[:, :k]), jnp.log(p[:, k])


@functools.partial(jax.jit, static_argnums=(2, 3))
def dense(ids: jax.Array, logprobs: jax.Array, vocab: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the target as the papers store it, [T, V]."""
    zeros = jnp.zeros((ids.shape[0], vocab), dtype)
    return zeros.at[jnp.arange(ids.shape[0])[:, None], ids].set(jnp.exp(logprobs).astype(dtype))


def naive(logits, labels, target):
    """CLM and KL (no tail event) from two dense log-softmaxes, as one writes them first."""
    logits = logits.astype(jnp.float32)
    clm = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
    target = target.astype(jnp.float32)
    log_p = jnp.where(target > 0, jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
    kl = (target * (log_p - jax.nn.log_softmax(logits / TAU))).sum(-1)
    return CLM_WEIGHT * clm.mean() + KL_WEIGHT * kl.mean()


def sparse(logits, labels, ids, logprobs):
    """The same from log-sum-exps and gathered logits, left to XLA and automatic differentiation."""
    logits = logits.astype(jnp.float32)
    clm = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    log_q = jnp.take_along_axis(logits, ids, axis=-1) / TAU - jax.nn.logsumexp(logits / TAU, axis=-1)[:, None]
    return CLM_WEIGHT * clm.mean() + KL_WEIGHT * (jnp.exp(logprobs) * (logprobs - log_q)).sum(-1).mean()


def clm_only(logits, labels):
    """Optax's cross-entropy alone."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def primitive(logits, labels, ids, logprobs, rest, implementation=None):
    """Ours at level 1: the primitive on whole logits."""
    both = jnp.concatenate([labels[:, None], ids], axis=1)
    rows = lse_gather(logits, both, temperatures=(1.0, TAU), implementation=implementation)
    slots = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    targets = slots, logprobs[:, None], rest[:, None], jnp.ones((len(ids), 1), bool)
    kl = event_divergence(rows.z[:, 1:], rows.lse[:, 1], *targets, tail="zero", temperature=TAU)
    return CLM_WEIGHT * (rows.lse[:, 0] - rows.z[:, 0]).mean() + KL_WEIGHT * kl.mean()


def one_pass(hidden, head, labels, ids, logprobs, rest, **options):
    """Ours at level 2, gradients in the forward scan."""
    ones = jnp.ones(len(labels), jnp.float32) / len(labels)
    call = functools.partial(linear_fusion_loss, temperature=TAU, tail="zero", **options)
    return call(hidden, head, labels, ids, logprobs, rest, CLM_WEIGHT * ones, KL_WEIGHT * ones)[0]


def recompute(hidden, head, labels, ids, logprobs, rest, **options):
    """Ours at level 2 for any cotangent."""
    call = functools.partial(linear_fused_softmax_kl, temperature=TAU, tail="zero", **options)
    out = call(hidden, head, labels, ids, logprobs, rest, jnp.ones(len(labels)))
    return CLM_WEIGHT * out.clm.mean() + KL_WEIGHT * out.kl.mean()


def compiled(fn: Callable, arguments: tuple, differentiate: tuple[int, ...], **facts: Any) -> Candidate:
    """Compiles loss and gradients of a JAX function."""
    program = jax.jit(jax.value_and_grad(fn, differentiate)).lower(*arguments).compile()
    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes
    facts["temporary_bytes"] = temporary
    facts["peak_bytes"] = temporary + memory.argument_size_in_bytes + memory.output_size_in_bytes
    facts["kernels"] = program.as_text().count('custom_call_target="mosaic_gpu')

    def wait(out: tuple) -> float:
        return float(jax.block_until_ready(out)[0])

    return Candidate(lambda: program(*arguments), wait, lambda out: out[1], facts)


def candidates(shape: tuple[int, ...]) -> dict[str, Callable[[], Candidate]]:
    """Returns the builders for a shape [T, V, K] (level 1) or [T, D, V, K] (level 2), the most wanted first."""
    return candidates_1(*shape) if len(shape) == 3 else candidates_2(*shape)


def candidates_1(tokens: int, vocab: int, k: int) -> dict[str, Callable[[], Candidate]]:
    """Returns the builders from given logits."""
    logits = jax.random.normal(jax.random.key(0), (tokens, vocab), jnp.bfloat16)
    labels, ids, logprobs, rest = draw(tokens, vocab, k)

    def ours(name: str | None) -> Candidate:
        backend = choose(name, tokens, vocab, k + 1, logits.dtype)
        call = functools.partial(primitive, implementation=name)
        return compiled(call, (logits, labels, ids, logprobs, rest), (0,), backend=backend)

    out = {"ours": lambda: ours(None)} if ON_GPU else {}
    return out | {
        "ours xla": lambda: ours("xla"),
        "optax CLM only": lambda: compiled(clm_only, (logits, labels), (0,)),
        "naive dense": lambda: compiled(naive, (logits, labels, dense(ids, logprobs, vocab, jnp.bfloat16)), (0,)),
        "sparse XLA": lambda: compiled(sparse, (logits, labels, ids, logprobs), (0,)),
    }


def candidates_2(tokens: int, embed: int, vocab: int, k: int) -> dict[str, Callable[[], Candidate]]:
    """Returns the builders from hidden states and head."""
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (tokens, embed), DTYPE)
    head = (jax.random.normal(keys[1], (embed, vocab)) * embed**-0.5).astype(DTYPE)
    labels, ids, logprobs, rest = draw(tokens, vocab, k)
    everything = hidden, head, labels, ids, logprobs, rest

    def whole(loss: Callable, *arguments: jax.Array, **facts: Any) -> Candidate:
        def from_hidden(h, w, *rest):
            return loss(jnp.matmul(h, w, preferred_element_type=jnp.float32), *rest)

        return compiled(from_hidden, (hidden, head, *arguments), (0, 1), **facts)

    def ours(loss: Callable, arguments: tuple = everything, **options: Any) -> Candidate:
        dtype = jnp.dtype(options.get("logits_dtype", jnp.float32))
        backend = choose(options.get("implementation"), tokens, vocab, 1 + arguments[3].shape[1], dtype)
        return compiled(functools.partial(loss, **options), arguments, (0, 1), backend=backend)

    level_1_backend = functools.partial(choose, None, tokens, vocab, k + 1, jnp.dtype(jnp.float32))
    out = {
        "ours one-pass": lambda: ours(one_pass),
        "ours CLM only": lambda: ours(one_pass, (hidden, head, labels, ids[:, :0], logprobs[:, :0], rest)),
        "optax CLM only": lambda: whole(clm_only, labels),
        "tokamax CLM only": lambda: tokamax_candidate(hidden, head, labels),
        "naive dense": lambda: whole(naive, labels, dense(ids, logprobs, vocab, DTYPE)),
        "ours recompute": lambda: ours(recompute),
        "ours level 1": lambda: whole(primitive, *everything[2:], backend=level_1_backend()),
        "sparse XLA": lambda: whole(sparse, labels, ids, logprobs),
    }
    if ON_GPU:
        out["ours one-pass, xla"] = lambda: ours(one_pass, implementation="xla")
        out["ours one-pass, bf16 logits"] = lambda: ours(one_pass, logits_dtype="bfloat16")
    return out | torch_candidates(hidden, head, labels, ids, logprobs)


def tokamax_candidate(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> Candidate:
    """Compiles tokamax's fused cross-entropy (it has no divergence)."""
    if importlib.util.find_spec("tokamax") is None:
        raise Unavailable("tokamax is not installed")
    import tokamax

    def loss(h, w, y):
        return tokamax.linear_softmax_cross_entropy_loss(h, y, w, reduction="mean")

    return compiled(loss, (hidden, head, labels), (0, 1))


def torch_candidates(*problem: jax.Array) -> dict[str, Callable[[], Candidate]]:
    """Returns the builders of the PyTorch losses of the same problem."""
    losses = functools.cache(lambda: torch_losses(*problem))
    names = "torch, papers' three dense targets", "torch, chunks of 256"
    return {name: lambda i=i: losses()[i] for i, name in enumerate(names)}


def torch_losses(hidden, head, labels, ids, logprobs) -> tuple[Candidate, Candidate]:
    """Returns the papers' dense loss, its target chosen of three by their cross-entropy, and a chunked loss."""
    if importlib.util.find_spec("torch") is None:
        raise Unavailable("torch is not installed")
    import torch
    from torch.nn import functional

    if ON_GPU and not torch.cuda.is_available():
        raise Unavailable("this torch is not built for a GPU")
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    arrays = (torch.tensor(np.asarray(x, np.float32)) for x in (hidden, head))
    h, w = (x.to(device, dtype).requires_grad_() for x in arrays)
    y, at = (torch.tensor(np.asarray(x), device=device).long() for x in (labels, ids))
    p = torch.tensor(np.exp(np.asarray(logprobs)), device=device)
    one = torch.zeros(len(hidden), head.shape[1], device=device, dtype=torch.bfloat16).scatter_(1, at, p.bfloat16())
    three = torch.stack([one, one.roll(1, 0), one.roll(2, 0)])

    def finish(loss):
        loss.backward()
        h.grad = w.grad = None
        return loss.detach()

    def both(z, label, target):
        clm = functional.cross_entropy(z, label, reduction="sum")
        kl = functional.kl_div(functional.log_softmax(z / TAU, -1), target.float(), reduction="sum")
        return (CLM_WEIGHT * clm + KL_WEIGHT * kl) / len(hidden)

    def papers():
        score = torch.stack([-torch.log(t.gather(1, y[:, None]).float() + 1e-9)[:, 0] for t in three])
        index = score.argmin(0)[None, :, None].expand(1, *one.shape)
        return finish(both((h @ w).float(), y, three.gather(0, index)[0]))

    def chunked():
        total = 0.0
        for i in range(0, len(hidden), 256):
            part = slice(i, i + 256)
            loss = both((h[part] @ w).float(), y[part], one[part])
            loss.backward()
            total += loss.detach()
        h.grad = w.grad = None
        return total

    return Candidate(papers, float, None, {}), Candidate(chunked, float, None, {})
