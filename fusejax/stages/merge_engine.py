"""A merge plan carried out over files: tensor by tensor, each in chunks.

Workers take tensors from the plan, largest first, and write them at their final places; nothing waits for a whole
model, and nothing holds a whole matrix (`merge_statistics`), so memory is some megabytes per worker whatever the model.
What cannot be merged in chunks (float64, 8-bit floats, integers) is merged as whole matrices, one at a time. With a
mesh every tensor is laid over its devices by rows, each device reads only its part, and the pure functions run as one
program over the mesh.

That inputs are finite is known before (`merge_scan`); a result beyond the range of its dtype ends the merge here.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.stream_read import ModelTensors, StoredTensor, dtype_of
from fusejax.io.stream_write import Staging, TensorWriter
from fusejax.merging import MERGE_METHODS, merge_leaf
from fusejax.merging.keys import matrix_keys
from fusejax.merging.plan import MergePlan, TensorMerge
from fusejax.merging.registry import resolve
from fusejax.stages.merge_chunks import RAW_DTYPES, Chunks, nonfinite, on_host
from fusejax.stages.merge_inputs import input_tensors, read_tensor
from fusejax.stages.merge_scan import kept_tensor
from fusejax.stages.merge_statistics import energies, is_chunked, prepare, row_length

__all__ = ["Made", "carry_out"]


class Made(NamedTuple):
    """What became of one output tensor."""

    coefficients: list[float] | None  # one per target
    xxh3: str  # of the bytes that were written


def carry_out(
    plan: MergePlan, models: Mapping[str, ModelTensors], writer: TensorWriter, staging: Staging, *,
    threads: int = 2, skipped: Mapping[str, Any] | None = None, mesh: Any = None,
    known: Mapping[str, np.ndarray] | None = None, tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Made]:  # fmt: skip
    """Makes every tensor of a plan that the staging directory does not hold yet.

    Args:
        plan: from `fusejax.merging.planner.plan_merge`.
        models: every model of the plan, open, its inputs finite but those of `skipped`.
        writer: has a place for every output tensor.
        staging: knows what an earlier, killed merge has finished.
        threads: workers.
        skipped: output tensors that are the base's.
        mesh: a `jax.sharding.Mesh` to merge on; None merges on the host.
        known: sums of squared changes of output tensors, [J], that `scan_inputs` has gathered.
        tick: called with the bytes of every finished tensor.

    Raises:
        InputError: a result beyond the range of its dtype.
    """
    run = _Run(plan, models, writer, skipped or {}, mesh, known or {})
    made: dict[str, Made] = {}
    for name, facts in staging.finished.items():
        if facts["xxh3"] == writer.checksum(name):
            made[name] = Made(**facts)
            tick(run.size(name))
    todo = sorted((s for s in plan.tensors if s.output not in made), key=lambda s: -run.size(s.output))

    def work(step: TensorMerge) -> None:
        if mesh is None:
            with on_host():
                found = run.make(step)
        else:
            found = run.make(step)
        staging.mark(step.output, **found._asdict())
        made[step.output] = found

    run.gather_energies(todo)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = {pool.submit(work, step): step for step in todo}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION, timeout=0.2)
                for future in done:
                    step = waiting.pop(future)
                    future.result()
                    tick(run.size(step.output))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {step.output: made[step.output] for step in plan.tensors}


class _Run:
    def __init__(
        self, plan: MergePlan, models: Mapping[str, ModelTensors], writer: TensorWriter, skipped: Mapping[str, Any],
        mesh: Any, known: Mapping[str, np.ndarray],
    ):  # fmt: skip
        self._plan, self._models, self._writer, self._skipped, self._mesh = plan, models, writer, skipped, mesh
        self._whole = threading.Lock()  # one whole matrix at a time
        self._energies = dict(known)  # what weights are made of, where that is known before the tensor is made

    def size(self, name: str) -> int:
        """Bytes of an output tensor."""
        return self._writer.size(name)

    def make(self, step: TensorMerge) -> Made:
        """Makes one tensor."""
        if step.output in self._skipped:
            return self._keep(step)
        tensors = input_tensors(self._plan, self._models, step)
        if self._mesh is not None:
            return self._on_mesh(step, tensors)
        if is_chunked([tensors[0].dtype, step.dtype]):
            return self._in_chunks(step, tensors)
        with self._whole:
            return self._as_a_whole(step, tensors)

    def _in_chunks(self, step: TensorMerge, tensors: Sequence[StoredTensor]) -> Made:
        spec, values = resolve(step.method, step.parameters, len(step.targets), step.base is not None)
        if spec.random:
            values = {**values, "key": matrix_keys(values["key"], step.output, None)}
        chunks = Chunks(tensors, row=row_length(step.method, values, tensors[0].shape))
        energy = self._energies.get(step.output)
        try:
            prepared = prepare(step.method, chunks, values, has_base=step.base is not None, energy=energy)
        except OverflowError:
            raise InputError(f"sums over {step.output} are beyond float32; is it the same model?") from None
        written, width = xxhash.xxh3_64(), dtype_of(step.dtype).itemsize
        for start, count, raw in chunks:
            piece = prepared(raw, start, count, step.dtype)
            if nonfinite(piece, step.dtype):
                raise _overflow(step)
            written.update(piece.data)
            self._writer.write(step.output, start * width, piece)
        return Made(None if prepared.coefficients is None else list(prepared.coefficients), written.hexdigest())

    def _as_a_whole(self, step: TensorMerge, tensors: Sequence[StoredTensor]) -> Made:
        merged, factors = _merged(step, [read_tensor(tensor) for tensor in tensors])
        merged = np.ascontiguousarray(merged)
        self._writer.write(step.output, 0, merged)
        return Made(factors, xxhash.xxh3_64(_bytes(merged)).hexdigest())

    def _on_mesh(self, step: TensorMerge, tensors: Sequence[StoredTensor]) -> Made:
        from fusejax.stages.merge_mesh import place_rows, written_rows

        merged, factors = _merged(step, [place_rows(tensor.load(), self._mesh) for tensor in tensors])
        if jnp.issubdtype(merged.dtype, jnp.floating) and not bool(jnp.isfinite(merged).all()):
            raise _overflow(step)
        for start, piece in written_rows(merged):
            self._writer.write(step.output, start, piece)
        return Made(factors, self._writer.checksum(step.output))

    def _keep(self, step: TensorMerge) -> Made:
        """Takes the base's tensor, as an input is not finite and that was asked for."""
        source = kept_tensor(self._plan, self._models, step)
        assert source is not None  # the scan has seen it
        array = np.ascontiguousarray(read_tensor(source).astype(dtype_of(step.dtype)))
        self._writer.write(step.output, 0, array)
        return Made(None, xxhash.xxh3_64(_bytes(array)).hexdigest())

    def gather_energies(self, steps: list[TensorMerge]) -> None:
        """Sums the changes of units wider than a matrix (`varm` by layer, module or model)."""
        units: dict[str, str] = {}
        sums: dict[str, np.ndarray] = {}
        wide = any(_unit(step) for step in steps)
        for step in self._plan.tensors if wide else ():
            unit = _unit(step)
            if unit is None or step.output in self._skipped:
                continue
            tensors = input_tensors(self._plan, self._models, step)
            if tensors[0].dtype not in RAW_DTYPES:
                raise InputError(
                    f"{step.output} is {tensors[0].dtype}; weights of wider units need a float of 16 or 32 bits"
                )
            units[step.output] = unit
            known = self._energies.get(step.output)
            sums[unit] = sums.get(unit, 0) + (energies(Chunks(tensors), len(tensors) - 1) if known is None else known)
        self._energies |= {name: sums[unit] for name, unit in units.items()}


def _merged(step: TensorMerge, arrays: list[Any]) -> tuple[Any, list[Any] | None]:
    """Merges whole matrices; also the coefficients where the method has them."""
    base, targets = (arrays[0], arrays[1:]) if step.base is not None else (None, arrays)
    wanted = MERGE_METHODS[step.method].coefficients is not None and jnp.issubdtype(arrays[0].dtype, jnp.floating)
    options = {"method": step.method, "params": step.parameters, "dtype": step.dtype, "coefficients": wanted}
    result = merge_leaf(step.output, base, targets, **options)
    merged, factors = result if wanted else (result, None)
    return merged, None if factors is None else np.asarray(factors, np.float64).tolist()


def _unit(step: TensorMerge) -> str | None:
    spec, values = resolve(step.method, step.parameters, len(step.targets), step.base is not None)
    found = spec.unit(step.output, **values) if spec.unit else None
    return None if found is None else found[0]


def _overflow(step: TensorMerge) -> InputError:
    return InputError(f"merging {step.output} gives values beyond the range of {step.dtype}; choose a wider dtype")


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
