"""A merge plan carried out over files: tensor by tensor, each in chunks where its method allows it.

Workers take tensors from the plan, largest first, and write them at their final places; nothing waits for a whole
model. The common methods need some megabytes per worker (`merge_chunks`); all others take whole matrices
(`merge_leaf`), one tensor at a time, and need about three float32 copies of the largest matrix per input. With a mesh
every tensor is laid over its devices by rows, each device reads only its part, and the pure functions run as one
program over the mesh.

Whether values are finite is found out where they are read, not in a pass of its own: a NaN ends the merge with the
names of tensor and file, and what was written so far lies in a temporary directory, which is removed.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.stream_read import ArrayTensor, FileTensor, ModelTensors, StoredTensor, dtype_of
from fusejax.io.stream_write import Staging, TensorWriter
from fusejax.merging import MERGE_METHODS, merge_leaf
from fusejax.merging.plan import MergePlan, TensorMerge, TensorRef
from fusejax.merging.registry import resolve
from fusejax.merging.vocabulary import align_rows
from fusejax.stages.merge_chunks import RAW_DTYPES, Chunks, energies, is_chunked, nonfinite, prepare

__all__ = ["NONFINITE", "Made", "carry_out", "gathers_rows"]

NONFINITE = ("error", "skip-tensor")


class Made(NamedTuple):
    """What became of one output tensor."""

    coefficients: list[float] | None  # one per target
    inputs: dict[str, str]  # model -> xxh3 of the bytes that were read
    xxh3: str  # of the bytes that were written
    skipped: list[str]  # files in which it was not finite; then it is the base's


def carry_out(
    plan: MergePlan, models: Mapping[str, ModelTensors], writer: TensorWriter, staging: Staging, *,
    threads: int = 2, nonfinite: str = "error", mesh: Any = None, tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Made]:  # fmt: skip
    """Makes every tensor of a plan that the staging directory does not hold yet.

    Args:
        plan: from `fusejax.merging.planner.plan_merge`.
        models: every model of the plan, open.
        writer: has a place for every output tensor.
        staging: knows what an earlier, killed merge has finished.
        threads: workers.
        nonfinite: "error", or "skip-tensor" to take the base's tensor where a target's is not finite.
        mesh: a `jax.sharding.Mesh` to merge on; None merges on the host.
        tick: called with the bytes of every finished tensor.

    Raises:
        InputError: an input with NaN or infinity, or a result beyond the range of its dtype.
    """
    run = _Run(plan, models, writer, nonfinite == "skip-tensor", mesh)
    made: dict[str, Made] = {}
    for name, facts in staging.finished.items():
        if facts["xxh3"] == writer.checksum(name):
            made[name] = Made(**facts)
            tick(run.size(name))
    todo = sorted((s for s in plan.tensors if s.output not in made), key=lambda s: -run.size(s.output))

    host = _host_device() if mesh is None else None

    def work(step: TensorMerge) -> None:
        with jax.default_device(host) if host else contextlib.nullcontext():
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


def _host_device() -> Any:
    """The host's own device, where there is an accelerator too: chunks are not worth a transfer."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class _Run:
    def __init__(
        self, plan: MergePlan, models: Mapping[str, ModelTensors], writer: TensorWriter, skip: bool, mesh: Any
    ):
        self._plan, self._models, self._writer, self._skip, self._mesh = plan, models, writer, skip, mesh
        self._steps = {step.output: step for step in plan.tensors}
        self._whole = threading.Lock()  # one whole matrix at a time
        self._energies: dict[str, np.ndarray] = {}

    def size(self, name: str) -> int:
        """Bytes of an output tensor."""
        return self._writer.size(name)

    def make(self, step: TensorMerge) -> Made:
        """Makes one tensor."""
        spec, values = resolve(step.method, step.parameters, len(step.targets), step.base is not None)
        refs = self._refs(step)
        with self._inputs(step, refs) as tensors:
            try:
                if self._mesh is not None:
                    return self._on_mesh(step, refs, tensors)
                if is_chunked(step.method, values, [*(t.dtype for t in tensors), step.dtype]):
                    return self._in_chunks(step, refs, tensors, values)
                with self._whole:
                    return self._as_a_whole(step, refs, tensors, spec)
            except _NotFinite as problem:
                return self._skipped(step, problem)

    def _refs(self, step: TensorMerge) -> list[TensorRef]:
        """The inputs that matter, the base first."""
        with_base = step.base is not None and MERGE_METHODS[step.method].uses_base
        return [*([step.base] if with_base and step.base else []), *step.targets]

    @contextlib.contextmanager
    def _inputs(self, step: TensorMerge, refs: list[TensorRef]) -> Iterator[list[StoredTensor]]:
        """The input tensors, of one shape and dtype."""
        tensors = [self._models[ref.model].tensors[ref.name] for ref in refs]
        aligned = gathers_rows(self._plan, step)
        if not aligned and step.vocabulary and self._plan.rows:
            tensors = [_first_rows(tensor, len(self._plan.tokens)) for tensor in tensors]
        dtypes = {tensor.dtype for tensor in tensors}
        if not aligned and len(dtypes) == 1:
            yield tensors
            return
        with self._whole:
            arrays = {ref.model: _read(tensor) for ref, tensor in zip(refs, tensors, strict=True)}
            if aligned:
                rows = {model: self._plan.rows[model] for model in arrays}
                default = self._plan.default_model if self._plan.default_model in arrays else None
                arrays = align_rows(arrays, rows, default=default)
            if len(dtypes) > 1:
                wide = jnp.result_type(*(dtype_of(name) for name in dtypes))
                arrays = {model: array.astype(wide) for model, array in arrays.items()}
            ready: list[StoredTensor] = [
                ArrayTensor(np.ascontiguousarray(arrays[ref.model]), tensor.where)
                for ref, tensor in zip(refs, tensors, strict=True)
            ]
        yield ready

    def _in_chunks(
        self, step: TensorMerge, refs: list[TensorRef], tensors: list[StoredTensor], values: dict[str, Any]
    ) -> Made:
        chunks = Chunks(tensors)
        try:
            prepared = prepare(step.method, chunks, values, self._energies.get(step.output))
        except OverflowError:
            _raise_bad(step, chunks)
            raise InputError(
                f"the squared changes of {step.output} are beyond float32; is it the same model?"
            ) from None
        _raise_bad(step, chunks)
        written, width = xxhash.xxh3_64(), dtype_of(step.dtype).itemsize
        for start, count, raw in chunks:
            piece = prepared(raw, start, count, step.dtype)
            if nonfinite(piece, step.dtype):
                _raise_bad(step, chunks)
                raise _overflow(step)
            written.update(piece.data)
            self._writer.write(step.output, start * width, piece)
        _raise_bad(step, chunks)
        inputs = {ref.model: digest for ref, digest in zip(refs, chunks.digests or [], strict=True)}
        coefficients = None if prepared.coefficients is None else list(prepared.coefficients)
        return Made(coefficients, inputs, written.hexdigest(), [])

    def _as_a_whole(self, step: TensorMerge, refs: list[TensorRef], tensors: list[StoredTensor], spec: Any) -> Made:
        arrays = [_read(tensor) for tensor in tensors]
        inputs = {ref.model: xxhash.xxh3_64(_bytes(a)).hexdigest() for ref, a in zip(refs, arrays, strict=True)}
        if bad := [t.where for t, array in zip(tensors, arrays, strict=True) if not _finite(array)]:
            raise _NotFinite(step.output, bad)
        base, targets = (arrays[0], arrays[1:]) if len(refs) > len(step.targets) else (None, arrays)
        wanted = spec.coefficients is not None and jnp.issubdtype(arrays[0].dtype, jnp.floating)
        options = {"method": step.method, "params": step.parameters, "dtype": step.dtype, "coefficients": wanted}
        result = merge_leaf(step.output, base, targets, **options)
        merged, factors = result if wanted else (result, None)
        merged = np.ascontiguousarray(merged)
        self._writer.write(step.output, 0, merged)
        coefficients = None if factors is None else np.asarray(factors, np.float64).tolist()
        return Made(coefficients, inputs, xxhash.xxh3_64(_bytes(merged)).hexdigest(), [])

    def _on_mesh(self, step: TensorMerge, refs: list[TensorRef], tensors: list[StoredTensor]) -> Made:
        from fusejax.stages.merge_mesh import place_rows, written_rows

        arrays = [place_rows(tensor.load(), self._mesh) for tensor in tensors]
        flags = [bool(jnp.isfinite(array).all()) for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
        if bad := [tensor.where for tensor, fine in zip(tensors, flags, strict=False) if not fine]:
            raise _NotFinite(step.output, bad)
        base, targets = (arrays[0], arrays[1:]) if len(refs) > len(step.targets) else (None, arrays)
        wanted = MERGE_METHODS[step.method].coefficients is not None and bool(flags)
        options = {"method": step.method, "params": step.parameters, "dtype": step.dtype, "coefficients": wanted}
        result = merge_leaf(step.output, base, targets, **options)
        merged, factors = result if wanted else (result, None)
        if flags and not bool(jnp.isfinite(merged).all()):
            raise _overflow(step)
        for start, piece in written_rows(merged):
            self._writer.write(step.output, start, piece)
        coefficients = None if factors is None else np.asarray(factors, np.float64).tolist()
        return Made(coefficients, {}, self._writer.checksum(step.output), [])

    def _skipped(self, step: TensorMerge, problem: "_NotFinite") -> Made:
        """Takes the base's tensor in place of one that cannot be merged, where that was asked for."""
        template = self._models[self._plan.template].tensors.get(step.output)
        source = self._models[step.base.model].tensors[step.base.name] if step.base else template
        advice = "the checkpoint is damaged or its training diverged; use an earlier one"
        if not self._skip:
            raise InputError(f"{problem}; {advice}, or keep the base's tensor with --nonfinite skip-tensor")
        array = None if source is None else _read(source)
        if (
            array is None
            or not _finite(array)
            or array.nbytes // array.itemsize != self.size(step.output) // (dtype_of(step.dtype).itemsize)
        ):
            raise InputError(f"{problem}, and the base has no finite tensor to keep in its place; {advice}")
        array = np.ascontiguousarray(array.astype(dtype_of(step.dtype)))
        self._writer.write(step.output, 0, array)
        return Made(None, {}, xxhash.xxh3_64(_bytes(array)).hexdigest(), problem.files)

    def gather_energies(self, steps: list[TensorMerge]) -> None:
        """Sums the changes of units wider than a matrix (`varm` by layer, module or model), in a pass of its own."""
        units: dict[str, str] = {}
        sums: dict[str, np.ndarray] = {}
        wide = any(_unit(step) for step in steps)
        for step in self._plan.tensors if wide else ():
            unit = _unit(step)
            if unit is None:
                continue
            with self._inputs(step, self._refs(step)) as tensors:
                if tensors[0].dtype not in RAW_DTYPES:
                    raise InputError(
                        f"{step.output} is {tensors[0].dtype}; weights of wider units need a float up to 32 bits"
                    )
                chunks = Chunks(tensors)
                energy = energies(chunks)
                if chunks.bad:
                    continue  # said when the tensor's turn comes
            units[step.output] = unit
            sums[unit] = sums.get(unit, 0) + energy
        self._energies = {name: sums[unit] for name, unit in units.items()}


def gathers_rows(plan: MergePlan, step: TensorMerge) -> bool:
    """Returns whether a tensor's rows are looked up by token; the first rows in their order are read as they lie."""
    if not (step.vocabulary and plan.rows):
        return False
    refs = [*([step.base] if step.base else []), *step.targets]
    return any(not np.array_equal(plan.rows[ref.model], np.arange(len(plan.tokens))) for ref in refs)


def _first_rows(tensor: StoredTensor, count: int) -> StoredTensor:
    loaded = tensor.load()
    if isinstance(loaded, FileTensor):
        return loaded._replace(shape=(count, *loaded.shape[1:]))
    return ArrayTensor(_read(loaded)[:count], loaded.where)


class _NotFinite(Exception):
    def __init__(self, name: str, files: list[str]):
        super().__init__(f"{name} holds NaN or infinity in {', '.join(files)}")
        self.files = files


def _unit(step: TensorMerge) -> str | None:
    spec, values = resolve(step.method, step.parameters, len(step.targets), step.base is not None)
    found = spec.unit(step.output, **values) if spec.unit else None
    return None if found is None else found[0]


def _raise_bad(step: TensorMerge, chunks: Chunks) -> None:
    if chunks.bad:
        raise _NotFinite(step.output, [chunks.tensors[row].where for row in sorted(chunks.bad)])


def _overflow(step: TensorMerge) -> InputError:
    return InputError(f"merging {step.output} gives values beyond the range of {step.dtype}; choose a wider dtype")


def _read(tensor: StoredTensor) -> np.ndarray:
    loaded = tensor.load()
    array = np.empty(math.prod(tensor.shape), dtype_of(tensor.dtype))
    loaded.read_into(0, array.view(np.uint8))
    return array.reshape(tensor.shape)


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _finite(array: np.ndarray) -> bool:
    name = array.dtype.name
    if name in RAW_DTYPES:
        return not nonfinite(array.reshape(-1).view(RAW_DTYPES[name]), name)
    return not jnp.issubdtype(array.dtype, jnp.floating) or bool(np.isfinite(array).all())
