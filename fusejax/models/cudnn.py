"""cuDNN's flash attention on NVIDIA GPUs, which never holds the scores of all queries and keys.

It computes in 16 bits, and it has no segment ids. Where every row holds one document, padded at its end, the documents'
lengths say all that it needs. A packed row needs its mask, `[B, 1, T, T]` as a bias of 16 bits.

`memory.attention: cudnn` asks for it. `auto` takes it where it has shown itself right: versions of cuDNN are known that
give NaN, and we have not run it, so before its first use forward and backward are tried on the device at hand against
plain operations, once per shape. `docs/notes/attention.md` says what was weighed.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fusejax.errors import InputError
from fusejax.parallel.processes import collect

__all__ = ["check_cudnn", "cudnn_attention", "document_lengths", "suits_cudnn"]

log = logging.getLogger("fusejax")

_DTYPES = ("bfloat16", "float16")
_PLATFORMS = ("gpu", "cuda")
_AMPERE = 8.0  # compute capability
_TRY_SECONDS = 300.0  # for which another process may be compiling its try
_TOLERANCE = 0.05  # of the largest value; 16 bits come to within 0.01, a row that reads a hidden key does not


def check_cudnn(dtype: Any, mesh: Mesh | None) -> None:
    """Raises an InputError where the program is not for GPUs, or does not compute in 16 bits."""
    if jnp.dtype(dtype).name not in _DTYPES:
        raise InputError(
            f"attention cudnn computes in bfloat16 or float16, got {jnp.dtype(dtype).name}; set train.compute_dtype "
            "bfloat16, or memory.attention auto"
        )
    device = _device(mesh)
    if device.platform not in _PLATFORMS:
        raise InputError(
            f"attention cudnn needs NVIDIA GPUs, the devices are {device.platform} ({device.device_kind}); set "
            "memory.attention auto"
        )


def suits_cudnn(q: jax.Array, k: jax.Array, mesh: Mesh | None, *, window: int | None, rows: bool) -> bool:
    """Returns whether the program is for NVIDIA GPUs from Ampere on, in 16 bits, and cuDNN is right there.

    Args:
        q, k: `[B, T, N, H]` and `[B, S, Nkv, H]`.
        mesh, window: as for `fusejax.models.layers.attention`.
        rows: whether no row holds two documents.
    """
    device, dtype = _device(mesh), jnp.dtype(q.dtype).name
    capability = str(getattr(device, "compute_capability", ""))  # AMD's begins with letters
    if device.platform not in _PLATFORMS or not capability[:1].isdigit() or float(capability) < _AMPERE:
        return False
    if dtype not in _DTYPES or q.shape[1] != k.shape[1]:
        return False
    shape = dtype, q.shape[1], q.shape[2] // k.shape[2], q.shape[3], window, rows
    return _agree_everywhere(*shape) if _spans_processes(mesh) else _agrees(*shape)


def document_lengths(segments: jax.Array) -> jax.Array:
    """Returns how many positions `[B]` of each row `[B, T]` are its document's; at least 1, so that no row is empty."""
    return jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, given: jax.Array, *, window: int | None = None
) -> jax.Array:
    """Returns causal attention, `[B, T, N, H]`; on one device.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, Nkv, H]`, Nkv divides N.
        given: `[B]` int32, positions of the one document that each row begins with, or the whole mask `[B, 1, T, T]`.
        window: with lengths: a query sees itself and the `window - 1` positions before it. A mask says it itself.
    """
    if given.ndim == 1:
        local = None if window is None else (window - 1, 0)
        options: dict[str, Any] = {"query_seq_lengths": given, "key_value_seq_lengths": given}
        options |= {"local_window_size": local}
    else:
        options = {"mask": given}
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", **options)


def _device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _spans_processes(mesh: Mesh | None) -> bool:
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


@functools.cache
def _agree_everywhere(*shape: Any) -> bool:
    """Whether they agree in every process: programs that differ would wait for each other for ever."""
    found = collect(f"attention {shape}", _agrees(*shape), seconds=_TRY_SECONDS)
    if any(found) and not all(found):
        bad = [rank for rank, agrees in enumerate(found) if not agrees]
        log.warning("attention: plain operations in place of cuDNN's, which serves all processes but %s", bad)
    return all(found)


@functools.cache
def _agrees(*shape: Any) -> bool:
    """Whether cuDNN and plain operations agree on this process's device; says so where they do not."""
    try:
        with ThreadPoolExecutor(1) as alone:  # which knows nothing of the trace and the mesh that this is called under
            difference = alone.submit(_difference, *shape).result()
    except Exception as error:  # whatever jax, cuDNN or the compiler raise where they do not serve this shape
        log.warning("attention: plain operations in place of cuDNN's, which failed when tried: %s", error)
        return False
    if difference <= _TOLERANCE:  # NaN is not
        return True
    log.warning(
        "attention: plain operations in place of cuDNN's, which is off by %.3g of the largest value when tried",
        difference,
    )
    return False


def _difference(dtype: str, length: int, groups: int, width: int, window: int | None, rows: bool) -> float:
    """The largest difference of results and gradients on one row of random heads, as a share of the largest value."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, n, width)), dtype) for n in (groups, 1, 1))
    index = np.arange(length)
    segments = np.where(index < length - length // 4, 1 + (0 if rows else index // max(length // 4, 1)), 0)[None]
    distance = index[:, None] - index[None, :]
    mask = (distance >= 0) & (distance < (window or length)) & (segments[:, :, None] == segments[:, None, :])
    mask, real = jnp.asarray(mask[:, None]), jnp.asarray(segments > 0)[..., None, None]
    given = document_lengths(jnp.asarray(segments)) if rows else mask

    def of(attend: Any) -> tuple[jax.Array, ...]:
        def total(*heads: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.where(real, attend(*heads).astype(jnp.float32), 0.0)  # what padding gives is not said
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return (out, *gradients)

    ours = of(lambda q, k, v: cudnn_attention(q, k, v, given, window=window))
    theirs = of(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask))
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.max([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs]))
