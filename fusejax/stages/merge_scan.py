"""One look at every input of a merge before anything is written: is it finite, and what is its hash.

It costs one more reading of the inputs, at the speed of memory or of the disk, and no arithmetic beyond two
reductions and xxh3. So a NaN in the last tensor is known before the first byte of the output, and the merge itself
need not look. Methods that only want to know how far the targets have moved (VaRM; SCE of all elements) are told from
this reading: the inputs of a tensor are then read side by side, and as sums of squared changes are finite only where
all inputs are, they replace the search as well.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.stream_read import ModelTensors, StoredTensor, dtype_of
from fusejax.merging.plan import MergePlan, TensorMerge, TensorRef
from fusejax.merging.registry import resolve
from fusejax.stages.merge_chunks import RAW_DTYPES, Chunks, nonfinite, on_host
from fusejax.stages.merge_statistics import energies, is_chunked, wants_energy

__all__ = ["NONFINITE", "Scan", "input_refs", "kept_tensor", "scan_inputs", "summed_steps"]

NONFINITE = ("error", "skip-tensor")
_BLOCK = 2**18  # elements at a time
_SHOWN = 20
_ADVICE = "the checkpoint is damaged or its training diverged; use an earlier one"


class Scan(NamedTuple):
    """What the inputs of a merge hold."""

    digests: Mapping[str, Mapping[str, str]]  # model -> tensor -> xxh3 of its bytes
    skipped: Mapping[str, list[str]]  # output tensor -> files in which an input is not finite
    energies: Mapping[str, np.ndarray]  # output tensor -> [J] sums of squared changes, where the method wants them


def input_refs(step: TensorMerge) -> list[TensorRef]:
    """Returns the inputs of a tensor, the base first where the method takes one."""
    return [*([step.base] if step.base else []), *step.targets]


def scan_inputs(
    plan: MergePlan, models: Mapping[str, ModelTensors], *, nonfinite: str = "error", threads: int = 2,
    sums: bool = True,
) -> Scan:  # fmt: skip
    """Reads every input tensor of a plan once.

    Args:
        plan: from `fusejax.merging.planner.plan_merge`.
        models: every model of the plan, open.
        nonfinite: one of `NONFINITE`: whether a tensor that is not finite ends the merge, or the base's is kept.
        threads: workers.
        sums: whether to gather `Scan.energies`.

    Raises:
        InputError: NaN or infinity, with all tensors and files; or nothing finite to keep in their place.
    """
    refs = dict.fromkeys(ref for step in plan.tensors for ref in input_refs(step))
    stored = {ref: models[ref.model].tensors[ref.name] for ref in refs}
    summed = summed_steps(plan, models) if sums else []
    groups = [[stored[ref] for ref in input_refs(step)] for step in summed]
    rest = list(refs.keys() - {ref for step in summed for ref in input_refs(step)})
    found: dict[TensorRef, tuple[str, bool]] = {}
    moved: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        together = pool.map(_scanned_together, groups)
        found.update(zip(rest, pool.map(lambda ref: _scanned(stored[ref]), rest), strict=True))
        for step, (energy, seen) in zip(summed, together, strict=True):
            found.update(zip(input_refs(step), seen, strict=True))
            if np.isfinite(energy).all():
                moved[step.output] = energy
    digests: dict[str, dict[str, str]] = {model: {} for model in plan.models}
    for ref in refs:  # in the order of the plan
        digests[ref.model][ref.name] = found[ref][0]
    bad = []
    for step in plan.tensors:
        if files := [models[ref.model].tensors[ref.name].where for ref in input_refs(step) if not found[ref][1]]:
            bad.append((step, files))
    if bad and nonfinite != "skip-tensor":
        told = [f"{step.output} holds NaN or infinity in {', '.join(files)}" for step, files in bad]
        more = [f"and {len(told) - _SHOWN} more"] if len(told) > _SHOWN else []
        raise InputError(
            "\n  ".join(["inputs are not finite:", *told[:_SHOWN], *more])
            + f"\n{_ADVICE[0].upper()}{_ADVICE[1:]}, or keep the base's tensors with --nonfinite skip-tensor"
        )
    for step, files in bad:
        kept = kept_tensor(plan, models, step)
        if kept is None or math.prod(kept.shape) != _size(plan, models, step) or not _scanned(kept)[1]:
            raise InputError(
                f"{step.output} holds NaN or infinity in {', '.join(files)}, and the base has no finite tensor to "
                f"keep in its place; {_ADVICE}"
            )
    return Scan(digests, {step.output: files for step, files in bad}, moved)


def kept_tensor(plan: MergePlan, models: Mapping[str, ModelTensors], step: TensorMerge) -> StoredTensor | None:
    """Returns the tensor that stands in where an input is not finite: the base's."""
    if step.base:
        return models[step.base.model].tensors[step.base.name]
    return models[plan.template].tensors.get(step.output)


def summed_steps(plan: MergePlan, models: Mapping[str, ModelTensors]) -> list[TensorMerge]:
    """Returns what is summed while scanning: its inputs are alike as they are stored, and serve this tensor only."""
    uses = Counter(ref for step in plan.tensors for ref in input_refs(step))
    found = []
    for step in plan.tensors:
        if step.base is None or len(step.targets) < 2 or (step.vocabulary and plan.rows):
            continue
        _, values = resolve(step.method, step.parameters, len(step.targets), True)
        tensors = [models[ref.model].tensors[ref.name] for ref in input_refs(step)]
        alike = len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1
        alone = all(uses[ref] == 1 for ref in input_refs(step))
        if wants_energy(step.method, values) and alike and alone and is_chunked([tensors[0].dtype, step.dtype]):
            found.append(step)
    return found


def _size(plan: MergePlan, models: Mapping[str, ModelTensors], step: TensorMerge) -> int:
    ref = input_refs(step)[0]
    shape = models[ref.model].tensors[ref.name].shape
    rows = len(plan.tokens) if step.vocabulary and plan.rows else shape[0] if shape else 1
    return rows * math.prod(shape[1:])


def _scanned_together(tensors: Sequence[StoredTensor]) -> tuple[np.ndarray, list[tuple[str, bool]]]:
    """The sums of squared changes from the first of some tensors, and what `_scanned` says of each."""
    hashes = [xxhash.xxh3_64() for _ in tensors]
    chunks = Chunks(tensors)

    def hashed() -> Iterator[tuple[int, int, np.ndarray]]:
        for start, count, raw in chunks:
            for digest, row in zip(hashes, raw, strict=True):
                digest.update(row[:count].view(np.uint8).data)
            yield start, count, raw

    with on_host():
        energy = energies(hashed(), len(tensors) - 1)
    if np.isfinite(energy).all():
        return energy, [(digest.hexdigest(), True) for digest in hashes]
    return energy, [_scanned(tensor) for tensor in tensors]  # not finite, or beyond float32


def _scanned(tensor: StoredTensor) -> tuple[str, bool]:
    """The xxh3 of a tensor's bytes, and whether all of its values are finite."""
    tensor = tensor.load()
    dtype, total, digest, finite = dtype_of(tensor.dtype), math.prod(tensor.shape), xxhash.xxh3_64(), True
    buffer = np.empty(min(_BLOCK, total), dtype)
    for start in range(0, total, _BLOCK):
        piece = buffer[: min(_BLOCK, total - start)]
        tensor.read_into(start, piece.view(np.uint8))
        digest.update(piece.view(np.uint8).data)
        finite = finite and _finite(piece)
    return digest.hexdigest(), finite


def _finite(values: np.ndarray) -> bool:
    name = values.dtype.name
    if name in RAW_DTYPES:
        return not nonfinite(values.view(RAW_DTYPES[name]), name)
    if values.dtype.kind in "biu":
        return True
    return bool(np.isfinite(values.astype(np.float64)).all())
