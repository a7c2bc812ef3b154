"""The part of `fusejax plan` that needs JAX with faked devices: a process of its own, JSON in, JSON out.

How many devices a process fakes is settled when JAX starts, so the command starts this module with the number in
the environment. Everything here is arithmetic on shapes and on what compilers say.
"""

__all__ = ["main", "plan", "work"]

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from fusejax.config import RunConfig, place_of
from fusejax.errors import InputError
from fusejax.io.models import open_config, resolve_model
from fusejax.models import ModelConfig, count_params
from fusejax.models.flops import flops_per_token
from fusejax.models.presets import find_preset
from fusejax.parallel.costs import Assumptions, step_time, wire_bytes
from fusejax.parallel.device_kinds import DEVICE_KINDS, DeviceKind
from fusejax.parallel.hlo import Collective, collectives, dot_flops, largest_array
from fusejax.stages.outlook import outlook
from fusejax.stages.plan_disk import disk_assumptions, disk_bytes, text_tokens
from fusejax.stages.plan_memory import Memory, measure, predict
from fusejax.stages.plan_program import Compiled, Shape, compile_for_device, compile_on_host, missing_compiler
from fusejax.stages.plan_traffic import memory_traffic, optimizer_bytes

USABLE = 0.92  # of a device's memory: the rest is the driver's, the collectives' and fragments'
_SHOWN = 3


def plan(config: RunConfig, mesh: dict[str, int], *, kind: DeviceKind, compiler: str, tokens: int | None) -> dict:
    """Returns everything that `fusejax plan` prints, as JSON-able values; see docs/plan.md for the keys.

    Raises:
      InputError: the model is not known, the mesh does not divide it, or the compiler is not here.
    """
    model = find_preset(config.target.model) or _planned(config)
    if config.train.seq_len > model.max_positions:
        raise InputError(f"train.seq_len is {config.train.seq_len}, the target has {model.max_positions} positions")
    shape = Shape.of(config, model, mesh)
    host = compile_on_host(shape)
    memory, said = _memory(shape, kind, compiler)
    usable = int(USABLE * kind.hbm_bytes)
    total_tokens, source = (tokens, "--tokens") if tokens else text_tokens(config)
    disk = disk_bytes(config, model, tokens=total_tokens)
    fits = memory.total <= usable and not said.get("refused")
    return {
        "per_device_bytes": memory.per_device(),
        "fits": fits,
        "device_kind": kind.name,
        "hbm_bytes": kind.hbm_bytes,
        "usable_bytes": usable,
        "memory_source": said["source"],
        "memory_items": memory.items,
        "predicted_bytes": predict(shape, tpu=kind.is_tpu).total,
        "compilers": {"cpu": _stated(host)} | said["compilers"],
        **({"refused": said["refused"]} if said.get("refused") else {}),
        "suggestions": [] if fits else _suggestions(config, shape, usable, tpu=kind.is_tpu),
        "mesh": dict(mesh),
        "devices": shape.devices,
        "parameters": count_params(model),
        **work(shape, kind, host),
        "disk_bytes": sum(disk.values()),
        "disk": disk,
        "disk_assumptions": disk_assumptions(config),
        "tokens": total_tokens,
        "tokens_source": source,
        "notes": notes(config),
    }


def notes(config: RunConfig) -> list[str]:
    """Returns in what the plan is not of the very program that the configuration runs."""
    found = []
    if config.memory.attention == "cudnn":
        found.append(
            "memory.attention is cudnn, the plan is of plain attention, whose scores of all positions by all stand in "
            "memory: activations, temporaries and seconds are upper bounds"
        )
    if config.memory.sequence_parallel and config.mesh.tensor == 1:
        found.append("memory.sequence_parallel does nothing where mesh.tensor is 1")
    return found


def _planned(config: RunConfig) -> ModelConfig:
    """The target's architecture as its directory says, or, where the run makes that, as the configuration does."""
    if place_of(config.target.model) in config.pretrained:
        return outlook(config, config.target).config
    return open_config(resolve_model(config.target.model, revision=config.target.revision, weights=False))


def _stated(compiled: Compiled) -> dict[str, Any]:
    found = {"argument_bytes": compiled.argument_bytes, "temporary_bytes": compiled.temporary_bytes}
    return found | {"seconds": round(compiled.seconds, 1)}


def _memory(shape: Shape, kind: DeviceKind, compiler: str) -> tuple[Memory, dict[str, Any]]:
    """The memory and who says so: the device's compiler where it is wanted and here, else the sum of items."""
    said: dict[str, Any] = {"source": "model", "compilers": {}}
    predicted = predict(shape, tpu=kind.is_tpu)
    if compiler == "cpu" or (compiler == "auto" and missing_compiler(kind)):
        return predicted, said
    try:
        compiled = compile_for_device(shape, kind)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return predicted, said | {"refused": str(error).splitlines()[0]}
    said["compilers"] = {compiled.compiler: _stated(compiled)}
    return measure(shape, compiled)._replace(items=predicted.items), said | {"source": f"compiler:{compiled.compiler}"}


def work(shape: Shape, kind: DeviceKind, host: Compiled) -> dict[str, Any]:
    """Operations, collectives and speed of a compiled step on devices of a kind."""
    assert host.program is not None
    found = collectives(host.program)
    flops = dot_flops(host.program)
    assumptions = Assumptions()
    moved = memory_traffic(shape, assumptions)
    time = step_time(kind, flops=flops, memory_bytes=sum(moved.values()), collectives=found, assumptions=assumptions)
    update = optimizer_bytes(shape.optimization, accumulation=shape.accumulation)
    per_token = flops_per_token(shape.model, shape.seq_len)
    rate = shape.tokens / time.expected
    return {
        "flops_per_token": per_token,
        "flops_per_token_source": "analytic: 6 per matrix parameter, 12 * layers * heads * head_dim * positions seen",
        "flops_per_token_program": round(flops * shape.devices / shape.tokens),
        "collective_bytes": wire_bytes(found),
        "collectives": _table(found),
        "largest_array": dict(zip(("bytes", "shape"), largest_array(host.program), strict=True)),
        "seconds_per_step": {name: round(value, 6) for name, value in time._asdict().items()},
        "tokens_per_second": {
            "expected": round(rate, 1),
            "without_overlap": round(shape.tokens / time.without_overlap, 1),
            "at_peak": round(shape.tokens / time.at_peak, 1),
        },
        "mfu": round(rate * per_token / (kind.bf16_flops * shape.devices), 4),
        "memory_traffic": moved,
        "assumptions": dataclasses.asdict(assumptions)
        | {"usable_share": USABLE, "optimizer_bytes_per_parameter": update},
        "step": {
            "batch_size": shape.batch_size,
            "seq_len": shape.seq_len,
            "accumulation": shape.accumulation,
            "rows_per_device": shape.rows,
            "remat": shape.model.remat,
            "compute_dtype": shape.model.dtype,
        },
    }


def _table(found: list[Collective]) -> list[dict[str, Any]]:
    """Collectives by kind, dtype and size of group: runs and bytes of one step on one device."""
    rows: dict[tuple, list[float]] = {}
    for c in found:
        row = rows.setdefault((c.kind, c.dtypes, c.group), [0, 0, 0.0])
        row[0] += c.count
        row[1] += c.bytes * c.count
        row[2] += c.wire_bytes * c.count
    names = ("kind", "dtype", "devices", "count", "bytes", "wire_bytes")
    table: list[dict[str, Any]] = [dict(zip(names, (*key, *map(int, row)), strict=True)) for key, row in rows.items()]
    return sorted(table, key=lambda row: -row["wire_bytes"])


def _suggestions(config: RunConfig, shape: Shape, usable: int, *, tpu: bool) -> list[dict[str, Any]]:
    """The first changes that make the step fit, mildest first."""
    found = []
    for change, changed in _changes(config, shape):
        try:
            total = predict(changed, tpu=tpu).total
        except (InputError, ValueError):
            continue
        if total <= usable:
            found.append({"change": change, "total_bytes": total})
        if len(found) == _SHOWN:
            break
    return found


def _changes(config: RunConfig, shape: Shape) -> Iterator[tuple[dict[str, Any], Shape]]:
    order = ("none", "dots", "full")
    remats = order[order.index(shape.model.remat) :]
    ways = shape.mesh["data"] * shape.mesh["fsdp"]
    most = max(1, shape.batch_size // ways)
    counts = [n for n in range(shape.accumulation, most + 1) if most % n == 0] or [shape.accumulation]
    grown: list[dict[str, int]] = [shape.mesh]
    if shape.mesh["data"] > 1:
        grown.append(shape.mesh | {"data": 1, "fsdp": ways})
    grown += [shape.mesh | {"fsdp": shape.mesh["fsdp"] * n} for n in (2, 4, 8, 16, 32)]
    for mesh in grown:
        rows = shape.batch_size // (mesh["data"] * mesh["fsdp"])
        for remat in remats:
            fewer = [n for n in range(1, shape.accumulation + 1) if rows and rows % n == 0][-1:]
            for count in counts if mesh is shape.mesh else fewer:
                change: dict[str, Any] = {"train.remat": remat, "train.accumulation": count}
                change |= {f"mesh.{axis}": size for axis, size in mesh.items() if size != shape.mesh[axis]}
                model = dataclasses.replace(shape.model, remat=remat)
                changed = shape._replace(model=model, accumulation=count, mesh=mesh)
                if changed != shape and rows:
                    kept = {"train.remat": shape.model.remat, "train.accumulation": shape.accumulation}
                    yield {key: value for key, value in change.items() if kept.get(key) != value}, changed


def main() -> int:
    """Reads a request from standard input and prints its plan; an input error goes to standard error, code 2."""
    asked = json.loads(sys.stdin.read())
    try:
        config = RunConfig.model_validate(asked["config"])
        kind = DEVICE_KINDS[asked["kind"]]
        found = plan(config, asked["mesh"], kind=kind, compiler=asked["compiler"], tokens=asked["tokens"])
    except InputError as error:
        print(str(error), file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
