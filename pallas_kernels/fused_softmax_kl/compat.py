"""What differs between the versions of JAX that are supported (0.10 to 0.12)."""

from typing import Any

import jax

__all__ = ["gpu_interpreter", "output_like"]


def output_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operand: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns a kernel's output type, varying over the same mesh axes as `operand` inside a `shard_map`."""
    varying = getattr(jax.typeof(operand), "manual_axis_type", None)
    return jax.ShapeDtypeStruct(shape, dtype, **({} if varying is None else {"manual_axis_type": varying}))


def gpu_interpreter() -> Any:
    """Returns the setting that runs a Mosaic GPU kernel in Pallas's interpreter."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = getattr(plgpu, "InterpretGPUParams", None)
    if params is None:
        raise NotImplementedError(f"JAX {jax.__version__} does not export the interpreter of Mosaic GPU kernels")
    return params()
