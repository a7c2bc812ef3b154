"""The device mesh: three named axes, always all three.

`data` replicates parameters, `fsdp` shards parameters and the batch, `tensor` splits heads, mlp and
vocabulary. Every mesh has the three axes (size 1 where unused), so that rules and losses need no cases.
The axis types are always given: the default of `jax.make_mesh` differs between versions of jax.

Not here: the start of several processes (`fusejax.parallel.processes`), and pipeline or context parallelism.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

__all__ = ["MESH_AXES", "is_explicit", "make_mesh"]

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    explicit: bool = False,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh with the axes data, fsdp and tensor over the first `data * fsdp * tensor` devices.

    Args:
        data: devices along which the batch is split and parameters are copied.
        fsdp: devices along which the batch and the parameters are split.
        tensor: devices along which heads, mlp and vocabulary are split.
        explicit: use `AxisType.Explicit` (sharding in types) instead of Auto.
        devices: the devices to use; all of `jax.devices()` by default.

    Raises:
        ValueError: a size below 1, or fewer devices than the product of the sizes.
    """
    sizes = (data, fsdp, tensor)
    if min(sizes) < 1:
        raise ValueError(f"mesh sizes must be at least 1, got data={data}, fsdp={fsdp}, tensor={tensor}")
    available = list(jax.devices() if devices is None else devices)
    needed = data * fsdp * tensor
    if needed > len(available):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} needs {needed} devices, but there are "
            f"{len(available)}; lower a size, or start more processes"
        )
    axis_types = ((AxisType.Explicit if explicit else AxisType.Auto),) * 3
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=available[:needed])
    except NotImplementedError:  # a torus of which no product of whole sides has these sizes: 4 x 8 x 8 as 128 x 2
        laid_out = mesh_utils.create_device_mesh(sizes, available[:needed], allow_split_physical_axes=True)
        return Mesh(laid_out, MESH_AXES, axis_types=axis_types)


def is_explicit(mesh: Mesh) -> bool:
    """Returns whether the mesh carries shardings in types (`AxisType.Explicit`)."""
    return any(axis_type == AxisType.Explicit for axis_type in mesh.axis_types)
