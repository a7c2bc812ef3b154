"""Which backend serves a call: the named one, else by device and shape.

* `None` takes `tpu` on a TPU, `mosaic_gpu` on a Hopper or newer NVIDIA GPU where it can serve the shape, else `xla`.
  The choice falls at lowering, so the same program moved to another platform still compiles.
* A named backend that cannot serve is an error that says why; it is never replaced silently.

Backends are imported when first used: `import pallas_kernels` loads no Pallas.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fused_softmax_kl import xla

if TYPE_CHECKING:
    from pallas_kernels.fused_softmax_kl.primitive import Spec

__all__ = ["IMPLEMENTATIONS", "check_implementation", "choose", "forward", "gradient", "platform"]

Array = jax.Array
IMPLEMENTATIONS = ("reference", "xla", "tpu", "mosaic_gpu")
_KERNELS = {"tpu": "tpu", "cuda": "mosaic_gpu"}  # platform in a lowering rule -> backend


def check_implementation(name: str | None) -> None:
    """Raises ValueError for a name that does not exist."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={name!r} does not exist here; choose None or one of {', '.join(IMPLEMENTATIONS)}"
        )


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.fused_softmax_kl.{name}")


def platform() -> str:
    """Returns the platform programs are made for by default: an abstract device's where one is set."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = jax.default_backend() if device is None else device.platform
    return "cuda" if name == "gpu" else name


def choose(
    name: str | None, tokens: int, vocab: int, gathered: int, dtype: jnp.dtype, *, out: jnp.dtype | None = None
) -> str:
    """Returns the backend for logits [tokens, vocab] and `gathered` ids: "xla", "tpu" or "mosaic_gpu".

    Args:
      name: of `implementation`.
      tokens, vocab, gathered, dtype: of the logits and ids.
      out: the gradient's dtype, None for the forward pass; each pass is chosen by itself.

    Raises:
      ValueError: a named backend cannot serve, and why.
    """
    check_implementation(name)
    if name in ("xla", "reference"):
        return "xla"
    wanted = name or _KERNELS.get(platform(), "xla")
    if wanted == "xla":
        return "xla"
    why = _backend(wanted).unsupported(tokens, vocab, gathered, dtype, out=out)
    if why is None:
        return wanted
    if name is None:
        return "xla"
    raise ValueError(f"implementation={name!r} cannot serve this call: {why}; use 'xla' or None")


def _run(
    function: str, logits: Array, ids: Array, limit: Array | int | None, spec: "Spec", rest: tuple, **options: Any
) -> Any:
    (tokens, vocab), gathered = logits.shape, ids.shape[1]
    backend = choose(spec.implementation, tokens, vocab, gathered, logits.dtype, out=options.get("dtype"))
    options |= {"temperatures": spec.temperatures, "softcap": spec.softcap}

    def portable(logits: Array, ids: Array, rest: tuple, *limits: Array):
        return getattr(xla, function)(logits, ids, limits[0] if limits else limit, *rest, **options)

    if backend == "xla":
        return portable(logits, ids, rest)

    def kernel(logits: Array, ids: Array, rest: tuple, *limits: Array):
        call = getattr(_backend(backend), function)
        return call(logits, ids, limits[0] if limits else limit, *rest, interpret=spec.interpret, **options)

    if spec.implementation is not None:
        return kernel(logits, ids, rest)
    target = next(p for p, name in _KERNELS.items() if name == backend)
    limits = () if limit is None else (jnp.asarray(limit, jnp.int32),)
    return lax.platform_dependent(logits, ids, rest, *limits, default=portable, **{target: kernel})


def forward(logits: Array, ids: Array, limit: Array | int | None, spec: "Spec") -> tuple[Array, Array, Array]:
    """Returns (top [T], sums [T, n], z [T, G]) of one shard from the chosen backend; see `xla.forward`."""
    return _run("forward", logits, ids, limit, spec, ())


def gradient(
    logits: Array,
    ids: Array,
    limit: Array | int | None,
    rows: xla.RowGradient,
    grad_z: Array,
    spec: "Spec",
    *,
    dtype: jnp.dtype,
) -> Array:
    """Returns dlogits [T, V] of one shard from the chosen backend; see `xla.gradient`."""
    return _run("gradient", logits, ids, limit, spec, (rows, grad_z), dtype=dtype)
