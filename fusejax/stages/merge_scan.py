"""One look at every input of a merge before anything is written: is it finite, and what is its hash.

It costs one more reading of the inputs, at the speed of memory or of the disk, and no arithmetic beyond two
reductions and xxh3. So a NaN in the last tensor is known before the first byte of the output, and the merge itself
need not look.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.stream_read import ModelTensors, StoredTensor, dtype_of
from fusejax.merging.plan import MergePlan, TensorMerge, TensorRef
from fusejax.stages.merge_chunks import RAW_DTYPES, nonfinite

__all__ = ["NONFINITE", "Scan", "input_refs", "kept_tensor", "scan_inputs"]

NONFINITE = ("error", "skip-tensor")
_BLOCK = 2**18  # elements at a time
_SHOWN = 20
_ADVICE = "the checkpoint is damaged or its training diverged; use an earlier one"


class Scan(NamedTuple):
    """What the inputs of a merge hold."""

    digests: Mapping[str, Mapping[str, str]]  # model -> tensor -> xxh3 of its bytes
    skipped: Mapping[str, list[str]]  # output tensor -> files in which an input is not finite


def input_refs(step: TensorMerge) -> list[TensorRef]:
    """Returns the inputs of a tensor, the base first where the method takes one."""
    return [*([step.base] if step.base else []), *step.targets]


def scan_inputs(
    plan: MergePlan, models: Mapping[str, ModelTensors], *, nonfinite: str = "error", threads: int = 2
) -> Scan:
    """Reads every input tensor of a plan once.

    Args:
        plan: from `fusejax.merging.planner.plan_merge`.
        models: every model of the plan, open.
        nonfinite: one of `NONFINITE`: whether a tensor that is not finite ends the merge, or the base's is kept.
        threads: workers.

    Raises:
        InputError: NaN or infinity, with all tensors and files; or nothing finite to keep in their place.
    """
    refs = list(dict.fromkeys(ref for step in plan.tensors for ref in input_refs(step)))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = dict(zip(refs, pool.map(lambda ref: _scanned(models[ref.model].tensors[ref.name]), refs), strict=True))
    digests: dict[str, dict[str, str]] = {model: {} for model in plan.models}
    for ref, (digest, _) in found.items():
        digests[ref.model][ref.name] = digest
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
    return Scan(digests, {step.output: files for step, files in bad})


def kept_tensor(plan: MergePlan, models: Mapping[str, ModelTensors], step: TensorMerge) -> StoredTensor | None:
    """Returns the tensor that stands in where an input is not finite: the base's."""
    if step.base:
        return models[step.base.model].tensors[step.base.name]
    return models[plan.template].tensors.get(step.output)


def _size(plan: MergePlan, models: Mapping[str, ModelTensors], step: TensorMerge) -> int:
    ref = input_refs(step)[0]
    shape = models[ref.model].tensors[ref.name].shape
    rows = len(plan.tokens) if step.vocabulary and plan.rows else shape[0] if shape else 1
    return rows * math.prod(shape[1:])


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
