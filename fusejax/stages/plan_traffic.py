"""The bytes that a training step reads and writes on one device beside its matrix products, for the predicted speed."""

__all__ = ["memory_traffic", "optimizer_bytes"]

import jax.numpy as jnp

from fusejax.config.stages import MOMENT_BYTES
from fusejax.models import count_params
from fusejax.parallel.costs import Assumptions
from fusejax.stages.fit import Optimization
from fusejax.stages.plan_memory import layer_bytes
from fusejax.stages.plan_program import Shape

_FLOAT32 = 4


def optimizer_bytes(optimization: Optimization, *, accumulation: int) -> int:
    """Returns the bytes per parameter of one update.

    The gradient is read for its norm and for the update; both moments, the parameters and, of narrow parameters, their
    float32 copy are read and written.
    """
    param = jnp.dtype(optimization.param_dtype).itemsize
    gradient = _FLOAT32 if accumulation > 1 else param
    master = _FLOAT32 if param < _FLOAT32 else 0
    return 2 * gradient + 2 * (2 * MOMENT_BYTES[optimization.moments_dtype] + param + master)


def _gradient_bytes(optimization: Optimization, *, accumulation: int) -> int:
    """Bytes per parameter and micro-batch: the gradient is written, and with accumulation added to a float32 sum."""
    param = jnp.dtype(optimization.param_dtype).itemsize
    return param + (param + 2 * _FLOAT32 if accumulation > 1 else 0)


def memory_traffic(shape: Shape, assumptions: Assumptions) -> dict[str, int]:
    """Returns the bytes of one step on one device, by what moves them.

    Without rematerialisation what a layer makes is not made again: one pass less than assumed.
    """
    how = {"accumulation": shape.accumulation}
    local = count_params(shape.model) // (shape.mesh["fsdp"] * shape.mesh["tensor"])
    passes = assumptions.layer_passes - (shape.model.remat == "none")
    width = jnp.dtype(shape.loss.get("logits_dtype") or jnp.float32).itemsize
    logits = width * shape.rows * shape.seq_len * (shape.model.vocab_size // shape.mesh["tensor"])
    return {
        "layers": shape.accumulation * passes * shape.model.num_layers * layer_bytes(shape),
        "logits": shape.accumulation * assumptions.logits_passes * logits,
        "gradients": shape.accumulation * _gradient_bytes(shape.optimization, **how) * local,
        "optimizer": optimizer_bytes(shape.optimization, **how) * local,
    }
