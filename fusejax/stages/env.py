"""What this installation consists of, and which settings its compilers take.

The first thing to read in a report of a defect, and the one stage that needs no configuration. Flags are tried in
processes of their own (`fusejax.stages.flags`); only then JAX's backend starts, as that is the only way to learn which
devices there are and how much memory they have. With `--flags` it does not start at all: what is printed there is for
the process that will use the device.
"""

import importlib.metadata
import io
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import jax

import fusejax
from fusejax.parallel.flags import FLAG_VARIABLES, load_settings, setting_kinds
from fusejax.stages.command import Result, parser
from fusejax.stages.flags import (
    Verdict,
    detect_device,
    export_lines,
    judge,
    kind_of,
    own_flags,
    refuse,
    resolve_kind,
)

__all__ = ["command", "print_environment", "run"]

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "array_record", "numpy", "transformers", "tokenizers"),
    *("sentencepiece", "safetensors", "datasets", "pydantic", "tyro", "torch"),
    *("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "libtpu"),
)
VARIABLES = (
    *("JAX_PLATFORMS", *FLAG_VARIABLES, "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR"),
    *("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "HF_HUB_OFFLINE"),
    *("FUSEJAX_DISTRIBUTED", "FUSEJAX_COORDINATOR", "FUSEJAX_PROCESSES", "FUSEJAX_PROCESS", "FUSEJAX_LOCAL_DEVICES"),
)


def run() -> dict[str, Any]:
    """Describes the installation.

    Returns:
        A JSON-able dict: `fusejax`, `python`, `platform`, `packages` (name -> version, or None where it is not
        installed), `kind` (whose settings fit this machine), `settings` (every flag and variable that fusejax knows,
        with `verdict`, `note` and `kinds`), `backend`, `devices` (id, kind, process and memory in bytes of each, None
        where the device does not say), `cpu_count` (cores this process may use), `memory_bytes` (physical memory, or
        None) and `variables` that are set.

    Raises:
        InputError: the environment holds a flag at which every process would end.
    """
    own = own_flags()
    kinds = {kind: load_settings(kind).settings for kind in setting_kinds()}
    every = list(dict.fromkeys(setting for settings in kinds.values() for setting in settings))
    verdicts = judge([*own, *every])
    refuse(verdicts[: len(own)])
    return {
        "fusejax": fusejax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "kind": kind_of(detect_device()),
        "settings": [
            {**_row(verdict), "kinds": sorted(kind for kind, settings in kinds.items() if verdict.setting in settings)}
            for verdict in verdicts[len(own) :]
        ],
        "backend": jax.default_backend(),
        "devices": [
            {"id": d.id, "kind": d.device_kind, "process": d.process_index, "memory_bytes": _device_memory(d)}
            for d in jax.devices()
        ],
        "cpu_count": _cpu_count(),
        "memory_bytes": _memory_bytes(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def command(name: str, words: list[str]) -> Result:
    """`fusejax env`."""
    arguments = parser(name, "Versions, devices, memory, and the flags that the installed compilers take.")
    arguments.add_argument(
        "--flags",
        metavar="KIND",
        help=f"print only `export` lines, for eval, of what is accepted: auto, {', '.join(setting_kinds())}, or a "
        ".yaml file of that form",
    )
    asked = arguments.parse_args(words).flags
    if asked is not None:
        return _flags(asked)
    info, text = run(), io.StringIO()
    print_environment(info, file=text)
    return Result(info, text.getvalue().rstrip())


def print_environment(info: dict[str, Any], *, file: TextIO | None = None) -> None:
    """Prints what `run` returned as aligned lines, for reading and for pasting into a report."""
    devices: dict[tuple[str, int | None], int] = {}
    for device in info["devices"]:
        key = (device["kind"], device["memory_bytes"])
        devices[key] = devices.get(key, 0) + 1
    rows = [
        ("fusejax", info["fusejax"]),
        ("python", f"{info['python']} on {info['platform']}"),
        *((name, version or "not installed") for name, version in info["packages"].items()),
        ("devices", ", ".join(f"{n} x {kind}{_size(size)}" for (kind, size), n in devices.items())),
        ("backend", info["backend"]),
        ("cores", str(info["cpu_count"])),
        ("memory", "unknown" if info["memory_bytes"] is None else f"{info['memory_bytes'] / 2**30:.1f} GiB"),
        *info["variables"].items(),
        ("settings for", f'{info["kind"]}: eval "$(fusejax env --flags {info["kind"]})"'),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}", file=file or sys.stdout)
    print("\nflags that fusejax knows, tried on the installed compilers:", file=file or sys.stdout)
    for row in info["settings"]:
        if row["variable"] in FLAG_VARIABLES:
            print(f"  {row['verdict']:<11}  {row['value']}  ({', '.join(row['kinds'])})", file=file or sys.stdout)


def _flags(kind: str) -> Result:
    """The lines to evaluate, with the user's own flags; what is left out of ours is named on standard error."""
    found, own = resolve_kind(kind), own_flags()
    verdicts = judge([*own, *found.settings])
    refuse(verdicts[: len(own)])
    verdicts = verdicts[len(own) :]
    _say_left_out(verdicts)
    lines = export_lines(verdicts)
    return Result({"kind": found.kind, "export": lines, "settings": [_row(verdict) for verdict in verdicts]}, lines)


def _say_left_out(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        if not verdict.accepted:
            print(f"fusejax: left out {verdict.setting.value}: {verdict.note}", file=sys.stderr)


def _row(verdict: Verdict) -> dict[str, Any]:
    words = {True: "accepted", False: "rejected", None: "not checked"}
    return {**verdict.setting._asdict(), "verdict": words[verdict.accepted], "note": verdict.note}


def _device_memory(device: Any) -> int | None:
    if device.process_index != jax.process_index():
        return None  # another process can ask it
    stats = device.memory_stats()  # None on CPUs
    return int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def _size(memory: int | None) -> str:
    return "" if memory is None else f" with {memory / 2**30:.1f} GiB usable"


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
