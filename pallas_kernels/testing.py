"""Compile kernels for machines that are not here.

`lower_for` needs jaxlib only: it runs the kernel compilers' own checks (block shapes, layouts, shared memory).
`aot_compile` makes the program itself and so finds what lowering does not: vector memory, registers, spills, and the
bytes of temporaries. It needs, for TPU, the libtpu wheel; for NVIDIA GPUs, the jax-cuda13-pjrt wheel of this jaxlib's
version and a `ptxas` of CUDA 13 on the PATH. Neither needs a device or a driver.

    lowered = lower_for("tpu", fn, jax.ShapeDtypeStruct((2048, 32000), "bfloat16"))
    compiled = aot_compile("v5p", fn, ...); compiled.memory_analysis().temp_size_in_bytes
"""

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

__all__ = ["CHIPS", "aot_compile", "count_kernels", "lower_for", "missing_compiler"]

# Name -> (platform, topology, kind of device).
CHIPS = {
    "v5e": ("tpu", "v5e:2x2", "TPU v5 lite"),
    "v5p": ("tpu", "v5p:2x2x1", "TPU v5"),
    "v6e": ("tpu", "v6e:2x2", "TPU v6 lite"),
    "7x": ("tpu", "tpu7x:2x2x1", "TPU7x"),
    "h200": ("cuda", "h200", "NVIDIA H200"),
}
_CUSTOM_CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}

# The figures of NVIDIA's data sheet and programming guide for compute capability 9.0, as XLA's target description.
_H200 = """
gpu_device_info {
  name: "NVIDIA H200" core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
"""


@contextlib.contextmanager
def _abstract(platform: str) -> Iterator[None]:
    if platform != "cuda":
        yield
        return
    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def lower_for(platform: str, fn: Callable, *arguments: Any) -> jax.stages.Lowered:
    """Returns `fn` of arguments (or their `ShapeDtypeStruct`s) lowered for "tpu", "cuda" (H200) or "cpu"."""
    with _abstract(platform):
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=(platform,))


def count_kernels(lowered: jax.stages.Lowered, platform: str) -> int:
    """Returns the number of Pallas kernels in a lowered program."""
    return lowered.as_text().count(f"custom_call @{_CUSTOM_CALLS[platform]}")


def missing_compiler(chip: str) -> str | None:
    """Returns what `aot_compile` lacks on this machine, or None."""
    if CHIPS[chip][0] == "tpu":
        return None if importlib.util.find_spec("libtpu") else "the libtpu wheel is not installed"
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
        return "the jax-cuda13-pjrt wheel is not installed"
    return None if shutil.which("ptxas") else "there is no ptxas on the PATH"


def _topology(chip: str) -> topologies.TopologyDescription:
    platform, name, _ = CHIPS[chip]
    if platform == "cuda":
        return topologies.get_topology_desc(name, platform=platform, target_config=_H200, topology="1x1x1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the cloud's metadata server which TPU this is
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(name, platform=platform)


def aot_compile(chip: str, fn: Callable, *arguments: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """Returns `fn` of abstract arguments compiled to the machine code of one chip of `CHIPS`.

    Raises:
      RuntimeError: the compiler is not installed; `missing_compiler` says which.
    """
    why = missing_compiler(chip)
    if why is not None:
        raise RuntimeError(f"cannot compile for {chip}: {why}")
    sharding = SingleDeviceSharding(_topology(chip).devices[0])
    placed = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments)
    return jax.jit(fn).trace(*placed).lower().compile()
