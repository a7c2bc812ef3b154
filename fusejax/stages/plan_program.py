"""The real training step of a configuration on devices that are not here: abstract arguments, one compilation.

Loss, optimiser, accumulation, shardings and donation are those that `fusejax.stages.fit` gives to the loop; only the
arrays are missing. The processor's compiler always partitions the program for faked devices: that gives collectives
and operations. Where the compiler of the accelerator is installed (libtpu; jax-cuda13-pjrt and ptxas), it compiles
the same program for the named device, without one: its memory is what the run will take.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.losses.fused import accelerator_chunk
from fusejax.models import ModelConfig, abstract_params
from fusejax.parallel.device_kinds import DeviceKind
from fusejax.parallel.hlo import Program, parse_program
from fusejax.stages.fit import Optimization, loss_function, loss_options, placement, rules, schedule_and_optimizer
from fusejax.stages.plan_targets import gpu_target, tpu_topology
from fusejax.train.loop import state_shardings
from fusejax.train.step import init_train_state, make_train_step
from fusejax.types import EventGroups, FusionBatch, TopK, TrainState

__all__ = ["Compiled", "Shape", "compile_for_device", "compile_on_host", "local_share", "missing_compiler"]

# Machine code is not run: it need not be good.
_DUMP = {"xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True, "xla_backend_optimization_level": 0}
_DUMPED, _WHOLE = "*after_spmd-partitioning*.txt", "*.before_optimizations.txt"


class Shape(NamedTuple):
    """What determines the compiled step; all of it hashable but the loss' options."""

    model: ModelConfig  # with the dtype and the rematerialisation of the training
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    accumulation: int
    mixed: int  # distributions per position (M)
    top_k: int
    sources: int
    loss: dict[str, Any]
    optimization: Optimization
    sequence_parallel: bool = False

    @classmethod
    def of(cls, config: RunConfig, model: ModelConfig, mesh: dict[str, int]) -> "Shape":
        """The step that `fusejax train` makes of a configuration, on a mesh."""
        train, fusion = config.train, config.fusions[0]
        how = {"dtype": train.compute_dtype, "remat": train.remat, "attention": config.plain_attention}
        sources = (len(fusion.sources) or len(config.sources)) + fusion.include_target
        return cls(
            dataclasses.replace(model, **how),
            dict(mesh),
            train.batch_size,
            train.seq_len,
            train.accumulation,
            1 if fusion.method == "min_ce" else sources,
            config.capture.entries(model.vocab_size),
            sources,
            loss_options(config),
            Optimization.of(config),
            config.memory.sequence_parallel,
        )

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def rows(self) -> int:
        """Rows of one micro-batch on one device."""
        return max(1, self.batch_size // (self.accumulation * self.mesh["data"] * self.mesh["fsdp"]))

    @property
    def tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.seq_len

    @property
    def chunk(self) -> int:
        """Tokens whose logits an accelerator holds at once."""
        return accelerator_chunk(self.rows * self.seq_len, self.model.vocab_size // self.mesh["tensor"])


class Compiled(NamedTuple):
    """What a compiler says of one device."""

    compiler: str  # platform
    argument_bytes: int
    temporary_bytes: int
    reused_bytes: int  # of the arguments, for results: the donated state
    seconds: float
    program: Program | None = None


def _batch(shape: Shape, rows: int, sharding: Any = None) -> FusionBatch:
    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, shape.seq_len, *sizes), dtype, sharding=sharding)

    m, k, f32 = shape.mixed, shape.top_k, jnp.float32
    targets = TopK(array(m, k), array(m, k, dtype=f32), array(m, dtype=f32))
    return FusionBatch(array(), array(), array(), array(), array(dtype=f32), targets, array(m), array(m, dtype=f32))


def _groups(shape: Shape, vocab: int) -> EventGroups:
    return EventGroups(np.zeros((shape.sources, vocab + 1), np.int32), np.zeros((shape.sources, vocab), np.int32))


def _lowered(shape: Shape, devices: Sequence[Any]) -> Any:
    """The step lowered for the first devices of those given, with the state donated as in the loop."""
    placed = placement(shape.model, shape.mesh, devices=devices)
    _, optimizer = schedule_and_optimizer(shape.model, shape.optimization, 1000)
    loss = shape.loss | {"chunk": shape.chunk}
    groups, lie = _groups(shape, shape.model.vocab_size), rules(shape.sequence_parallel)
    loss_fn = loss_function(shape.model, groups, loss, placed.get("mesh"), lie)
    step = make_train_step(loss_fn, optimizer, accumulation=shape.accumulation)
    abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer), abstract_params(shape.model))
    if not placed:
        single = jax.sharding.SingleDeviceSharding(devices[0])
        shardings = jax.tree.map(lambda _: single, abstract)
        batch, out, where = _batch(shape, shape.batch_size, single), None, contextlib.nullcontext()
    else:
        shardings = state_shardings(abstract, placed["mesh"], placed["param_shardings"])
        batch = _batch(shape, shape.batch_size, placed["batch_sharding"])
        out, where = (shardings, None), jax.set_mesh(placed["mesh"])
    state: TrainState = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    with where:
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch)


def compile_on_host(shape: Shape) -> Compiled:
    """Compiles the step for faked devices, as many as the mesh has, and reads the partitioned program."""
    began = time.perf_counter()
    if len(jax.devices()) < shape.devices:
        raise InputError(f"the mesh needs {shape.devices} faked devices, this process has {len(jax.devices())}")
    lowered = _lowered(shape, jax.devices())
    with tempfile.TemporaryDirectory() as place:
        memory = lowered.compile(compiler_options=_DUMP | {"xla_dump_to": place}).memory_analysis()
        found = glob.glob(f"{place}/{_DUMPED}") or glob.glob(f"{place}/{_WHOLE}")  # one device: not partitioned
        if len(found) != 1:
            raise RuntimeError(f"this version of XLA wrote {len(found)} partitioned programs, expected 1")
        text = Path(found[0]).read_text()
    return Compiled("cpu", *_sizes(memory), time.perf_counter() - began, parse_program(text))


def missing_compiler(kind: DeviceKind) -> str | None:
    """Returns what compiling for a device lacks on this machine, None where nothing does."""
    if kind.is_tpu:
        return None if importlib.util.find_spec("libtpu") else "the libtpu wheel is not installed"
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
        return "the jax-cuda13-pjrt wheel is not installed"
    return None if shutil.which("ptxas") else "there is no ptxas on the PATH"


def compile_for_device(shape: Shape, kind: DeviceKind) -> Compiled:
    """Compiles the step by the device's own compiler.

    Raises:
      InputError: the compiler, or the arrangement of that many devices, is not known here.
    """
    from jax.experimental import topologies

    if why := missing_compiler(kind):
        raise InputError(f"cannot compile for {kind.name}: {why}; use --compiler cpu")
    began = time.perf_counter()
    if kind.is_tpu:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the cloud's metadata server which TPU this is
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc(tpu_topology(kind.name, shape.devices), platform="tpu")
    else:
        nodes, ways = -(-shape.devices // kind.linked), min(shape.devices, kind.linked)
        options = {"target_config": gpu_target(kind), "topology": f"1x{nodes}x{ways}"}
        topology = topologies.get_topology_desc(kind.name.lower(), platform="cuda", **options)
    memory = _lowered(shape, topology.devices).compile().memory_analysis()
    return Compiled("tpu" if kind.is_tpu else "cuda", *_sizes(memory), time.perf_counter() - began)


def _sizes(memory: Any) -> tuple[int, int, int]:
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.alias_size_in_bytes


def local_share(shape: Shape, *, remat: str) -> list[jax.ShapeDtypeStruct]:
    """Returns what one device keeps from the forward pass of a micro-batch for the backward pass, but parameters.

    One device computes whole rows on its part of the heads, of the feed-forward width and of the vocabulary: that
    is a smaller model, whose residuals are asked for by shape.
    """
    cfg, ways = shape.model, shape.mesh["tensor"]
    sizes = {name: getattr(cfg, name) for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")}
    local = dataclasses.replace(cfg, remat=remat, **{name: max(1, size // ways) for name, size in sizes.items()})
    loss_fn = loss_function(local, _groups(shape, local.vocab_size), shape.loss | {"chunk": shape.chunk}, None)
    kept_dtype = jnp.dtype(shape.optimization.param_dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kept_dtype), abstract_params(local))

    def residuals(params: Any, batch: FusionBatch) -> Any:
        return jax.vjp(lambda p: loss_fn(p, batch, jnp.float32(1.0))[0], params)[1]

    given = [(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    kept = []
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, _batch(shape, shape.rows))):
        if (leaf.shape, leaf.dtype) in given:
            given.remove((leaf.shape, leaf.dtype))
        else:
            kept.append(leaf)
    return kept
