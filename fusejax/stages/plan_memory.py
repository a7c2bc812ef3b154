"""What a training step holds on one device, item by item, without compiling it for that device.

Parameters and optimiser state follow from the shardings, exactly. What the forward pass keeps follows from the
shapes of the program's own residuals, exactly. Temporaries are a sum of what must exist at the fullest moment:

    always    gradients of the step (in the parameters' dtype, sharded like them; with accumulation a float32 sum
              as well); the gathered head (compute dtype)
    and       backward through one layer: its recomputed residuals, its gathered weights and their gradients;
    or        the loss: the head's gradient (float32, whole; and this device's part of its sum), a chunk of logits.

The embedding is not gathered: it is read, and its gradient summed, where it is stored (`Layout.take_rows`).

TPUs need less, in two ways that are counted (`tpu`): their kernel for attention holds no scores, and their compiler,
which orders a step for its memory, lets share it what does not exist at once: the head with its loss, and the
backward pass of a layer.

The processor's compiler is no guide to the last part: it computes bfloat16 in float32, so it holds up to twice as
much (docs/plan.md has the table). Compilers of accelerators schedule the rest differently, by some percent.
"""

__all__ = ["Memory", "layer_bytes", "measure", "predict"]

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fusejax.config.stages import MOMENT_BYTES
from fusejax.models import param_table
from fusejax.parallel import ShardingRules, spec_for
from fusejax.stages.plan_program import Compiled, Shape, local_share

_TOP = 2  # bytes for each row of a leaf beside moments in 8 bits
_STATE = 4  # bytes of float32: a parameter, each moment and a gradient, unless the configuration says otherwise


class Memory(NamedTuple):
    """Bytes of one device."""

    params: int
    optimizer: int
    activations: int
    temporaries: int
    items: dict[str, int]  # what temporaries are made of, where that is known

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.optimizer + self.activations + self.temporaries

    def per_device(self) -> dict[str, int]:
        """The figures by name, for JSON."""
        names = ("params", "optimizer", "activations", "temporaries", "total")
        return {name: int(getattr(self, name)) for name in names}


def _split(shape: Shape) -> dict[str, tuple[int, int]]:
    """Path -> (elements of one device, elements of its part over `tensor` alone)."""
    found = {}
    for path, row in param_table(shape.model).items():
        ways = _ways(row.axes, shape)
        size = math.prod(row.shape)
        found[path] = -(-size // math.prod(ways.values())), -(-size // ways.get("tensor", 1))
    return found


def _ways(axes: tuple[str, ...], shape: Shape) -> dict[str, int]:
    """The mesh axes over which an array with these logical axes lies, and their sizes."""
    found = {}
    for entry in spec_for(axes, ShardingRules()):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            found[axis] = shape.mesh[axis]
    return found


def _moment_bytes(shape: Shape, local: int) -> int:
    """Both moments of one device's `local` parameters."""
    found = 2 * MOMENT_BYTES[shape.optimization.moments_dtype] * local
    if shape.optimization.moments_dtype == "int8":
        for row in param_table(shape.model).values():
            found += _TOP * math.prod(row.shape[:-1]) // math.prod(_ways(row.axes[:-1], shape).values())
    return found


def _bytes(leaves: list[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _kept_bytes(shape: Shape, leaves: list[jax.ShapeDtypeStruct], *, remat: str) -> int:
    """Bytes of what layers keep; the residual stream is split where it lies over `tensor`, what projections read not.

    Without rematerialisation a layer keeps two such inputs, attention's and the feed-forward part's.
    """
    ways = shape.mesh["tensor"] if shape.sequence_parallel else 1
    stream = [x for x in leaves if x.shape[-2:] == (shape.seq_len, shape.model.hidden_size)]
    read = [x for x in stream if x.dtype == jnp.dtype(shape.model.dtype)][-2:] if remat == "none" else []
    return _bytes(leaves) - (_bytes(stream) - _bytes(read)) * (ways - 1) // ways


def _stacked(shape: Shape, remat: str) -> list[jax.ShapeDtypeStruct]:
    return [x for x in local_share(shape, remat=remat) if x.shape[:1] == (shape.model.num_layers,)]


def predict(shape: Shape, *, tpu: bool = False) -> Memory:
    """Returns the memory of a step by the sum above, for GPUs or TPUs; takes about a second and no devices."""
    sizes, layers = _split(shape), shape.model.num_layers
    width = jnp.dtype(shape.model.dtype).itemsize
    param = jnp.dtype(shape.optimization.param_dtype).itemsize
    local = sum(own for own, _ in sizes.values())
    in_layers = sum(whole for path, (_, whole) in sizes.items() if path.startswith("layers."))
    kept, everything = (_stacked(shape, remat) for remat in (shape.model.remat, "none"))
    if tpu and _without_scores(shape):
        square = (shape.seq_len, shape.seq_len)
        kept, everything = ([x for x in leaves if x.shape[-2:] != square] for leaves in (kept, everything))
    own_head, head = sizes.get("head.kernel", sizes["embed.embedding"])
    gathered = shape.mesh["fsdp"] > 1
    layer_weights = width * in_layers // layers
    columns = shape.model.vocab_size // shape.mesh["tensor"]
    gradients = local * (param + (_STATE if shape.accumulation > 1 else 0))
    head_bytes = width * head if gathered or width != param else 0
    # without rematerialisation what a layer needs is kept already; about half of it again is in flight
    share = 0.5 if shape.model.remat == "none" else 1.0
    backward = int(share * _kept_bytes(shape, everything, remat="none") / layers) + layer_weights
    loss = _STATE * (head + own_head) + shape.chunk * columns * (4 + width)
    items = {"gradients": gradients}
    if tpu:
        phases = {"backward of a layer": backward, "head and loss": head_bytes + loss}
        fullest = max(phases, key=lambda name: phases[name])
        items[fullest] = phases[fullest]
    else:
        items |= {"head": head_bytes, "backward of a layer" if backward >= loss else "loss": max(backward, loss)}
    master = _STATE * local if param < _STATE else 0  # narrow parameters have a float32 copy
    activations = _kept_bytes(shape, kept, remat=shape.model.remat)
    return Memory(param * local, _moment_bytes(shape, local) + master, activations, sum(items.values()), items)


def _without_scores(shape: Shape) -> bool:
    """Whether the step takes the kernel for TPUs; see `fusejax.models.layers.attention`."""
    model = shape.model
    plain = model.attention != "auto" or model.block.alibi_bias_max or model.block.full_attention_layers
    return not plain and shape.seq_len % 128 == 0


def measure(shape: Shape, compiled: Compiled) -> Memory:
    """Returns the memory of a step as its compiler states it; parameters, moments and activations as predicted."""
    found = predict(shape, tpu=compiled.compiler == "tpu")
    batch = compiled.argument_bytes - found.params - found.optimizer
    kept = min(found.activations, compiled.temporary_bytes)
    return Memory(found.params, found.optimizer, kept, compiled.temporary_bytes - kept + max(batch, 0), {})


def layer_bytes(shape: Shape) -> int:
    """Returns the bytes that one layer makes in the forward pass of a micro-batch, its weights left out."""
    weights = {tuple(row.shape) for path, row in param_table(shape.model).items() if path.startswith("layers.")}
    made = [x for x in _stacked(shape, "none") if x.shape not in weights]
    return _kept_bytes(shape, made, remat="none") // shape.model.num_layers
