"""How compilers are told of devices that are not here: TPU topologies by name, GPUs by their data sheet."""

__all__ = ["gpu_target", "tpu_topology"]

from fusejax.errors import InputError
from fusejax.parallel.device_kinds import DeviceKind

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SOLID = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}
_FAMILIES = {"v4": ("v4", _SOLID), "v5e": ("v5e", _FLAT), "v5p": ("v5p", _SOLID), "v6e": ("v6e", _FLAT)}

# Compute capability -> streaming multiprocessors, shared memory of one, of one block (opt-in), floating-point units.
_GPUS = {
    "A100": ("major: 8", 108, 167936, 166912, 64, 1.41, 41943040),
    "H100": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 233472, 232448, 128, 1.98, 52428800),
    "H200": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 233472, 232448, 128, 1.98, 52428800),
}


def tpu_topology(kind: str, devices: int) -> str:
    """Returns the name of a slice.

    Raises:
      InputError: no slice of that kind has that many chips.
    """
    name, shapes = _FAMILIES.get(kind, ("", {}))
    if devices not in shapes:
        raise InputError(
            f"no slice of {devices} chips of {kind} is known; known sizes: {', '.join(map(str, shapes)) or 'none'}. "
            "Use --compiler cpu"
        )
    return f"{name}:{shapes[devices]}"


def gpu_target(kind: DeviceKind) -> str:
    """Returns XLA's description of a GPU.

    Raises:
      InputError: a GPU whose data sheet is not here.
    """
    family = kind.name.split("-")[0]
    if family not in _GPUS:
        raise InputError(f"no compiler target for {kind.name}; known: {', '.join(_GPUS)}. Use --compiler cpu")
    capability, cores, shared, block, units, clock, cache = _GPUS[family]
    name = kind.aliases[0]
    return f"""
gpu_device_info {{
  name: "{name}" core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  cuda_compute_capability {{ {capability} }}
  memory_bandwidth: {int(kind.hbm_bandwidth)} device_memory_size: {kind.hbm_bytes} l2_cache_size: {cache}
  shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
"""
