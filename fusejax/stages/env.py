"""What this installation consists of: versions, devices, cores, memory and the flags that JAX was given.

The first thing to read in a report of a defect, and the one stage that needs no configuration. It starts
JAX's backend, as that is the only way to learn which devices there are, and touches nothing else.
"""

import importlib.metadata
import io
import os
import platform
import sys
from typing import Any, TextIO

import jax

import fusejax
from fusejax.stages.command import Result, parser

__all__ = ["command", "print_environment", "run"]

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "array_record", "numpy", "transformers", "tokenizers"),
    *("sentencepiece", "safetensors", "datasets", "pydantic", "tyro", "torch"),
)
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR", "HF_HUB_OFFLINE")


def run() -> dict[str, Any]:
    """Describes the installation.

    Returns:
        A JSON-able dict: `fusejax`, `python`, `platform`, `packages` (name -> version, or None where it is not
        installed), `backend`, `devices` (id, kind, process of each), `cpu_count` (cores this process may use),
        `memory_bytes` (physical memory, or None where the system does not say) and `variables` that are set.
    """
    return {
        "fusejax": fusejax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": [{"id": d.id, "kind": d.device_kind, "process": d.process_index} for d in jax.devices()],
        "cpu_count": _cpu_count(),
        "memory_bytes": _memory_bytes(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def command(name: str, words: list[str]) -> Result:
    """`fusejax env`."""
    parser(name, "Versions, devices, cores and memory of this installation, for a report of a defect.").parse_args(
        words
    )
    info, text = run(), io.StringIO()
    print_environment(info, file=text)
    return Result(info, text.getvalue().rstrip())


def print_environment(info: dict[str, Any], *, file: TextIO | None = None) -> None:
    """Prints what `run` returned as aligned lines, for reading and for pasting into a report."""
    memory = info["memory_bytes"]
    kinds: dict[str, int] = {}
    for device in info["devices"]:
        kinds[device["kind"]] = kinds.get(device["kind"], 0) + 1
    rows = [
        ("fusejax", info["fusejax"]),
        ("python", f"{info['python']} on {info['platform']}"),
        *((name, version or "not installed") for name, version in info["packages"].items()),
        ("devices", ", ".join(f"{n} x {kind}" for kind, n in kinds.items()) + f" ({info['backend']})"),
        ("cores", str(info["cpu_count"])),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        *info["variables"].items(),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=file or sys.stdout)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
