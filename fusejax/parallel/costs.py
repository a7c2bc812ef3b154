"""How long a training step takes on devices that are not here: a roofline with stated shares of the peaks.

    compute        operations of the matrix products / (peak * `matmul_share`)
    memory         bytes that elementwise work moves / (bandwidth * `memory_share`)
    communication  bytes that each device sends / (bandwidth on the way * `link_share`)

Compute and memory add up; communication is hidden behind both as far as it goes (the schedulers of XLA for GPU and
TPU gather the next layer's parameters while this one computes), or not at all: `expected` and `without_overlap`. The
shares are assumptions, the same for every device, and are printed with every prediction, as are the passes by which
the bytes are counted. Not here: latency, which counts for small arrays only; stragglers; input; checkpoints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusejax.parallel.device_kinds import DeviceKind
from fusejax.parallel.hlo import Collective

__all__ = ["Assumptions", "StepTime", "communication_seconds", "step_time", "wire_bytes"]


@dataclass(frozen=True)
class Assumptions:
    """Shares of a device's peaks that programs reach, and how often what they make goes to or from its memory."""

    matmul_share: float = 0.6
    memory_share: float = 0.8
    link_share: float = 0.8
    layer_passes: int = 4  # what a layer makes: forward, again in the backward pass, backward, its gradient
    logits_passes: int = 3  # written; read for the sums; read for their gradient


class StepTime(NamedTuple):
    """Seconds of one optimiser step on every device."""

    compute: float
    memory: float
    communication: float
    expected: float  # communication behind the rest
    without_overlap: float
    at_peak: float  # matrix products at the device's peak, and nothing else: what cannot be beaten


def wire_bytes(collectives: Sequence[Collective]) -> int:
    """Returns the bytes that each device sends in one call of the program."""
    return int(sum(c.wire_bytes * c.count for c in collectives))


def communication_seconds(collectives: Sequence[Collective], kind: DeviceKind, *, link_share: float) -> float:
    """Returns the seconds that collectives take one after another.

    Within one node (GPU) or one pod (TPU) a device has its fast links. A ring through several of them crosses from one
    to the next once, and there are as many rings as the group has members in each: their adapters work together.
    """
    seconds = 0.0
    for c in collectives:
        nodes = c.groups // kind.linked
        members = min(int(np.unique(row, return_counts=True)[1].min()) for row in nodes)
        near = bool(np.all(nodes == nodes[:, :1]))
        beyond = min(kind.network_bandwidth * members, kind.link_bandwidth)
        seconds += c.wire_bytes * c.count / ((kind.link_bandwidth if near else beyond) * link_share)
    return seconds


def step_time(
    kind: DeviceKind,
    *,
    flops: float,
    memory_bytes: float,
    collectives: Sequence[Collective],
    assumptions: Assumptions = Assumptions(),
) -> StepTime:
    """Returns the predicted time of a step.

    Args:
        kind: the device.
        flops: operations of the matrix products of one device, recomputed ones included.
        memory_bytes: read and written by everything else, on one device.
        collectives: of the partitioned program.
        assumptions: shares of the peaks.
    """
    compute = flops / (kind.bf16_flops * assumptions.matmul_share)
    memory = memory_bytes / (kind.hbm_bandwidth * assumptions.memory_share)
    communication = communication_seconds(collectives, kind, link_share=assumptions.link_share)
    busy = compute + memory
    peak = flops / kind.bf16_flops
    return StepTime(compute, memory, communication, max(busy, communication), busy + communication, peak)
