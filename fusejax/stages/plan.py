"""`fusejax plan`: memory, speed, traffic and disk of a run, without weights and without accelerators.

The step that `train` would run is made abstractly, on as many faked devices as the mesh has, in a process of its
own. `fusejax.stages.plan_memory` says how memory is found, `fusejax.parallel.costs` how speed is, `docs/plan.md`
how far both were off where they could be checked.

Deliberately not here: choosing the mesh. The plan says what does not fit and what would; the choice is a person's.
"""

__all__ = ["command", "preset_run", "run"]

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fusejax
from fusejax.config import RunConfig, load_config
from fusejax.errors import InputError, nearest
from fusejax.models.presets import PRESETS
from fusejax.parallel.device_kinds import DEVICE_KINDS, DeviceKind, find_device_kind
from fusejax.stages.command import Result, parse_config, parser, positive_int
from fusejax.stages.plan_text import render

COMPILERS = ("auto", "cpu", "device")
_ONE: dict[str, int] = {"data": 1, "fsdp": 1, "tensor": 1}
_MOST_DEVICES = 512
_DESCRIPTION = "Memory, speed, collectives and disk of a run: no weights, no accelerators."


def command(name: str, words: list[str]) -> Result:
    """`fusejax plan CONFIG --mesh data=1,fsdp=8,tensor=1 [--devices N] [--device-kind K] [--section.key value]`."""
    options = parser(name, _DESCRIPTION)
    options.add_argument("config", nargs="?", help="configuration, or one of " + ", ".join(PRESETS))
    options.add_argument("--mesh", help="data=1,fsdp=8,tensor=1; default: that of the configuration")
    options.add_argument("--devices", type=positive_int, help="devices in all; the axis `data` takes what is left over")
    options.add_argument("--device-kind", "--device", default="A100-40G", help=", ".join(DEVICE_KINDS))
    options.add_argument(
        "--compiler", choices=COMPILERS, default="auto", help="who states the memory: see docs/plan.md"
    )
    options.add_argument("--tokens", type=float, help="training tokens, for the disk; default: from the configuration")
    chosen, rest = options.parse_known_args(words)
    if chosen.config is None:
        raise InputError(f"usage: fusejax {name} CONFIG.yaml --mesh data=1,fsdp=8,tensor=1; see fusejax {name} --help")
    if chosen.config.lower() in PRESETS:
        config = preset_run(chosen.config, _mesh(chosen.mesh, dict(_ONE), chosen.devices))
    else:
        config = load_config(chosen.config)
    if rest:
        config = _overridden(name, config, chosen.config, rest)
    kind = find_device_kind(chosen.device_kind)
    if kind is None:
        known = nearest(chosen.device_kind, DEVICE_KINDS)
        raise InputError(f"unknown device {chosen.device_kind!r}.{known} Known: {', '.join(DEVICE_KINDS)}")
    mesh = _mesh(chosen.mesh, config.mesh.model_dump(), chosen.devices)
    tokens = int(chosen.tokens) if chosen.tokens else None
    found = run(config, mesh, kind=kind, compiler=chosen.compiler, tokens=tokens)
    return Result(found, render(found))


def run(
    config: RunConfig, mesh: dict[str, int], *, kind: DeviceKind, compiler: str = "auto", tokens: int | None = None
) -> dict[str, Any]:
    """Plans a run in a process with that many faked devices.

    Args:
      config: the run; its own mesh is replaced.
      mesh: sizes of the axes data, fsdp and tensor.
      kind: the device.
      compiler: "device" takes memory from the device's compiler, "cpu" from the sum of items, "auto" from the
        former where it is installed.
      tokens: of the training text.

    Raises:
      InputError: a configuration that no such mesh can run, and what would.
    """
    needed = 1
    for size in mesh.values():
        needed *= size
    if needed > _MOST_DEVICES:
        raise InputError(f"a mesh of {needed} devices; at most {_MOST_DEVICES} can be faked. Plan a smaller data axis")
    config = RunConfig.model_validate(config.model_dump(mode="json") | {"mesh": mesh})  # rows must divide
    asked = {"config": config.model_dump(mode="json"), "mesh": mesh, "kind": kind.name}
    asked |= {"compiler": compiler, "tokens": tokens}
    root = str(Path(fusejax.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={needed}",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    words = [sys.executable, "-m", "fusejax.stages.plan_child"]
    done = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the plan was refused")
    if done.returncode:
        raise RuntimeError(f"the planning process ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def preset_run(name: str, mesh: dict[str, int]) -> RunConfig:
    """The published recipe of FuseLLM with this target: 128 rows of 2048 tokens, one row per device at a time."""
    rows = max(1, 128 // (mesh["data"] * mesh["fsdp"]))
    train = {"compute_dtype": "bfloat16", "remat": "full", "accumulation": rows}
    values = {"output": "runs/plan", "target": name, "sources": ["llama-2-7b", "open-llama-7b"]}
    return RunConfig.model_validate(values | {"corpus": {"train": [{"path": "train.jsonl"}]}, "train": train})


def _overridden(name: str, config: RunConfig, shown: str, rest: list[str]) -> RunConfig:
    if Path(shown).is_file():
        return parse_config(name, [shown, *rest], _DESCRIPTION)
    import tyro

    return tyro.cli(RunConfig, default=config, prog=f"fusejax {name} {shown}", args=rest)


def _mesh(text: str | None, default: dict[str, int], devices: int | None) -> dict[str, int]:
    """The mesh axes of `data=1,fsdp=8,tensor=1`; an axis that is not named is 1."""
    mesh = dict(default)
    if text is not None:
        mesh = dict(_ONE)
        for part in text.split(","):
            axis, _, size = part.partition("=")
            if axis.strip() not in _ONE or not size.strip().isdigit() or int(size) < 1:
                raise InputError(f"--mesh {text!r}: {part!r} is no axis of a mesh; expected data=1,fsdp=8,tensor=1")
            mesh[axis.strip()] = int(size)
    if devices is not None:
        inner = mesh["fsdp"] * mesh["tensor"]
        if devices % inner:
            raise InputError(f"--devices {devices} is no multiple of fsdp * tensor = {inner}")
        if mesh["data"] not in (1, devices // inner):
            raise InputError(f"--devices {devices} and the mesh {mesh} do not agree; leave out data")
        mesh["data"] = devices // inner
    return mesh
