"""The training loop: where a run starts, what is saved when, and what stops it.

A run starts by one rule: the newest checkpoint in `checkpoint_dir` if there is one and `resume` is true, else
`params`. A checkpoint holds the train state, the loader's position and their checksums; a run that is cut in two
gives the same bits as one that is not (same devices, same versions).

The step is compiled once, ahead of time, with the shardings of the state (parameters as given, each optimiser
moment like its parameter, scalars replicated) and of the batch; the state is donated. Metrics of a step are read
after the next one has been dispatched, so that the device does not wait for the host.

A loss or gradient that is not finite stops the run with a FloatingPointError that names the step and its
documents, or is left out where `faults` allows it (`fusejax.train.skipping`); the step has left the state alone
(`fusejax.train.step`). Evaluation is a callback that sees the parameters between two steps; it returns numbers and
changes nothing. Checkpoints are written in the background; one that fails is told after the next step.

Inside `fusejax.train.faults.guarded` the loop saves and stops when a signal asks for it, and a watchdog is told what
it is doing. Without that, signals do what they do in any Python program.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fusejax.errors import InputError
from fusejax.io.checkpoint import StateWriter, drop_steps_after, latest_step, restore_newest_state
from fusejax.io.progress import say
from fusejax.parallel.processes import collect
from fusejax.train.faults import FaultPolicy, Guard, active_guard
from fusejax.train.metrics import MetricsWriter
from fusejax.train.skipping import SkipPolicy
from fusejax.train.step import LossFn, init_train_state, make_train_step
from fusejax.types import FusionBatch, TrainState

__all__ = ["Loader", "TrainResult", "place", "state_shardings", "train"]

Values = dict[str, float]
_CAREFUL = FaultPolicy()


class Loader(Protocol):
    """What the loop needs of `fusejax.data.loader.FusionLoader`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[FusionBatch]: ...

    def batch(self, step: int) -> FusionBatch: ...

    def documents(self, step: int) -> list[str]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class TrainResult(NamedTuple):
    """What `train` returns."""

    state: TrainState
    history: list[Values]  # per step of this call: step, loss, loss parts, grad_norm, tokens_per_second ...
    start_step: int  # 0, or the step of the checkpoint that was resumed
    compile_seconds: float
    peak_bytes: int  # per device, of the compiled step as XLA states it; 0 where it states nothing


def train(
    params: Any,
    loader: Loader,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    total_steps: int | None = None,
    accumulation: int = 1,
    mesh: Mesh | None = None,
    param_shardings: Any | None = None,
    batch_sharding: NamedSharding | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 0,
    keep: int | None = 2,
    resume: bool = True,
    resume_step: int | None = None,
    metrics: str | Path | None = None,
    log_every: int = 1,
    tensorboard_dir: str | Path | None = None,
    wandb_project: str | None = None,
    schedule: Callable[[int], Any] | None = None,
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    annotate: Callable[[Values], Mapping[str, float]] | None = None,
    on_step: Callable[[int, Values], None] | None = None,
    names: Sequence[str] = (),
    faults: FaultPolicy = _CAREFUL,
) -> TrainResult:
    """Trains `params` on the loader's batches and returns the final state.

    Args:
        params: nested dict of arrays; only shapes and dtypes are read when a checkpoint is resumed. Not modified.
        loader: gives batch n for update n; it is put at the step of the checkpoint.
        loss_fn, optimizer, accumulation: see `make_train_step`.
        total_steps: updates of the whole run, resumed ones included; None takes all of the loader's.
        mesh, param_shardings, batch_sharding: where arrays lie; without a mesh everything is on one device.
        checkpoint_dir: where checkpoints go and are resumed from; None keeps none.
        checkpoint_every: steps between checkpoints (0: only the one at the end); keep: how many stay.
        resume: False refuses a directory that has checkpoints; resume_step: goes back to this one.
        metrics: JSONL file, a line every `log_every` steps; lines beyond the resumed step are dropped.
        tensorboard_dir, wandb_project: see `MetricsWriter`.
        schedule: learning rate of update n, to report it; annotate: more numbers for a step's line, from the others.
        evaluate: `(params, step) -> numbers`, every `evaluate_every` steps and at the end (0: at the end only).
        on_step: `(step, values)` after each step; names: of vector metrics' elements, `metric/name` each.
        faults: what happens when something goes wrong.

    Raises:
        InputError: arguments or a checkpoint that do not fit. FloatingPointError: a step that is not finite.
        Preempted: stopped by a signal, and saved.
    """
    total = len(loader) if total_steps is None else total_steps
    _check(loader, total, mesh, param_shardings, batch_sharding)
    skips = SkipPolicy(max_skipped=faults.max_skipped_steps, spike_factor=faults.spike_factor)
    with contextlib.ExitStack() as stack:
        guard = active_guard()
        stack.enter_context(guard.watching(faults.watchdog_seconds))
        saver = None if checkpoint_dir is None else stack.enter_context(StateWriter(checkpoint_dir, keep=keep))
        start = _start_step(checkpoint_dir, resume=resume, resume_step=resume_step)
        shardings = _shardings(params, optimizer, mesh, param_shardings)
        state, start = _start_state(params, loader, optimizer, shardings, checkpoint_dir, start, faults, skips)
        if resume_step is not None and checkpoint_dir is not None:
            drop_steps_after(checkpoint_dir, start or 0)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        writer = None
        if metrics is not None and jax.process_index() == 0:
            boards = {"tensorboard_dir": tensorboard_dir, "wandb_project": wandb_project}
            writer = stack.enter_context(MetricsWriter(metrics, resume_step=start, **boards))
        if (start or 0) >= total:
            return TrainResult(state, [], start or 0, 0.0, 0)
        step_fn = make_train_step(loss_fn, optimizer, accumulation=accumulation)
        example = place(loader.batch(start or 0), batch_sharding)
        compiled, seconds, peak = _compile(step_fn, state, example, shardings, limited=faults.spike_factor is not None)
        how = {"batch_sharding": batch_sharding, "guard": guard, "skips": skips, "names": names}
        run = _Run(state, loader, compiled, start or 0, **how)
        run.report = _reporter(writer, log_every, total, schedule, annotate, on_step)
        evaluation = (evaluate, evaluate_every, writer)
        with guard.training():
            _drive(run, total, guard=guard, saver=saver, checkpoint_every=checkpoint_every, evaluation=evaluation)
        return TrainResult(run.state, run.history, start or 0, seconds, peak)


def place(tree: Any, sharding: Any | None) -> Any:
    """Puts a tree of host arrays on devices, never sharing memory with the caller's arrays.

    `sharding` is one for all leaves (a batch: each process gives its own rows), a tree of them (parameters: each
    process gives the whole), or None for one device.
    """
    if sharding is None:
        return jax.tree.map(lambda x: jax.device_put(x, jax.local_devices()[0], may_alias=False), tree)
    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

    def whole(x: Any, s: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, s, may_alias=False)
        return jax.make_array_from_callback(x.shape, s, lambda index: np.asarray(x[index]))

    return jax.tree.map(whole, tree, sharding)


def state_shardings(abstract: TrainState, mesh: Mesh, param_shardings: Any) -> TrainState:
    """Returns shardings for a whole train state: moments lie like their parameter, everything else is replicated.

    An optimiser's leaf belongs to a parameter if its path ends in the parameter's path and the shapes agree, or if it
    has one element for each row of the parameter.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract.params)
    flat = tree.flatten_up_to(param_shardings)
    known = {tuple(path): (leaf.shape, s) for (path, leaf), s in zip(paths, flat, strict=True)}

    def of(path: tuple, leaf: Any) -> NamedSharding:
        for cut in range(len(path)):
            shape, sharding = known.get(tuple(path[cut:]), (None, replicated))
            if shape == leaf.shape:
                return sharding
            if shape and (*shape[:-1], 1) == leaf.shape:
                return NamedSharding(mesh, PartitionSpec(*sharding.spec[: len(shape) - 1]))
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(of, abstract.opt_state)
    return TrainState(replicated, param_shardings, opt_state)


class _Run:
    """A run between its first and last step: the state, where it is, and what was measured."""

    report: Callable[[int, Values], None]

    def __init__(
        self,
        state: TrainState,
        loader: Loader,
        compiled: Any,
        step: int,
        *,
        batch_sharding: Any,
        guard: Guard,
        skips: SkipPolicy,
        names: Sequence[str],
    ):
        self.state, self.step, self.history = state, step, []
        self._guard, self._skips, self._names = guard, skips, names
        self._loader, self._compiled, self._batch_sharding = loader, compiled, batch_sharding
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._clock = time.perf_counter()

    def advance(self, total: int) -> Iterator[int]:
        """Yields the number of steps done after each; the metrics of all but the last are known by then."""
        self._guard.attend("waiting for a batch", self.step)
        for batch in self._loader:
            self._guard.attend("stepping", self.step)
            limit = self._skips.limit(self.step + 1)
            given = () if limit is None else (np.float32(limit),)
            self.state, metrics = self._compiled(self.state, place(batch, self._batch_sharding), *given)
            self.flush()
            self.step += 1
            self._pending = (self.step, metrics)
            self._guard.attend("waiting for a batch", self.step)
            if self.step == total:
                self.flush()
            yield self.step
            if self.step == total:
                return

    def flush(self) -> None:
        """Waits for the step in flight, checks it and reports it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = _scalars(jax.device_get(metrics), self._names)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        told = self._skips.judge(
            step,
            values["loss"],
            values["grad_norm"],
            skipped=bool(values["skipped"]),
            documents=lambda: self._loader.documents(step - 1),
        )
        if told:
            say(told)
        else:
            del values["skipped"]
        values["trained_share"] = values["trained_tokens"] / max(values["real_tokens"], 1.0)
        values |= {"seconds": seconds, "tokens_per_second": values["real_tokens"] / max(seconds, 1e-9)}
        self.history.append({"step": step, **values})
        self.report(step, self.history[-1])

    def evaluate(self, evaluate: Callable[[Any, int], Mapping[str, float]], writer: MetricsWriter | None) -> None:
        """Calls the hook between two steps; its time does not count as training time."""
        self.flush()
        self._guard.attend("evaluating", self.step)
        numbers = {f"eval/{name}": float(value) for name, value in evaluate(self.state.params, self.step).items()}
        self.history[-1].update(numbers)
        if writer is not None:
            writer.write(self.step, numbers)
        self._clock = time.perf_counter()

    def save(self, saver: StateWriter, *, now: bool) -> None:
        """Saves a state whose last step is known to be finite or left out; `now` waits until it is committed."""
        self.flush()
        self._guard.attend("saving", self.step)
        extra = {"loader": self._loader.get_state(), "skips": self._skips.get_state()}
        saver.save(self.step, self.state, extra | {"jax": jax.__version__, "devices": jax.device_count()})
        if now:
            saver.wait()
        self._clock = time.perf_counter()


def _scalars(metrics: Mapping[str, Any], names: Sequence[str]) -> Values:
    """Metrics as floats: the elements of a vector [N] by their names, or numbers where there are none."""
    found: Values = {}
    for metric, value in metrics.items():
        if np.ndim(value):
            keys = names or range(len(value))
            found |= {f"{metric}/{key}": float(x) for key, x in zip(keys, value, strict=True)}
        else:
            found[metric] = float(value)
    return found


def _drive(
    run: _Run, total: int, *, guard: Guard, saver: StateWriter | None, checkpoint_every: int, evaluation: Any
) -> None:
    """Takes the steps that are left, evaluates, saves and stops between them."""
    evaluate, evaluate_every, writer = evaluation
    for step in run.advance(total):
        last = step == total
        if saver is not None:
            saver.check()
        if evaluate is not None and (last or (evaluate_every and step % evaluate_every == 0)):
            run.evaluate(evaluate, writer)
        stop = guard.must_stop(step)
        if saver is not None and (last or stop or (checkpoint_every and step % checkpoint_every == 0)):
            run.save(saver, now=last or stop)
        if stop:
            raise guard.preempted(f"step {step} {'is the last that was done' if saver is None else 'is saved'}")


def _check(loader: Loader, total: int, mesh: Any, param_shardings: Any, batch_sharding: Any) -> None:
    if not 1 <= total <= len(loader):
        raise InputError(f"total_steps is {total}, but the loader has {len(loader)} steps; change epochs or the steps.")
    given = [mesh is not None, param_shardings is not None, batch_sharding is not None]
    if any(given) and not all(given):
        raise InputError("mesh, param_shardings and batch_sharding are given together or not at all.")


def _start_step(directory: str | Path | None, *, resume: bool, resume_step: int | None) -> int | None:
    """Returns the checkpointed step to resume from, or None to start from the parameters given."""
    found = None if directory is None else latest_step(directory)
    if resume_step is not None:
        if directory is None or not resume:
            raise InputError(f"resume_step {resume_step} needs a checkpoint_dir and resume=True.")
        return resume_step  # restoring tells which steps there are if this is not one
    if found is not None and not resume:
        raise InputError(f"{directory} holds checkpoints up to step {found}; resume, or take an empty directory.")
    return found


def _shardings(params: Any, optimizer: Any, mesh: Mesh | None, param_shardings: Any) -> TrainState | None:
    if mesh is None:
        return None
    abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    return state_shardings(abstract, mesh, param_shardings)


def _start_state(
    params: Any,
    loader: Loader,
    optimizer: Any,
    shardings: TrainState | None,
    directory: Any,
    step: int | None,
    faults: FaultPolicy,
    skips: SkipPolicy,
) -> tuple[TrainState, int | None]:
    """Returns the state to start from and its checkpoint's step, None where it is the beginning."""
    if step is None:
        loader.set_state({"step": 0})
        first = loader.batch(0)
        if not any(collect("first batch", bool(np.any(first.mask)), seconds=600)):
            raise InputError("no position of the first batch is trained: every mask is 0. Check the loss mask.")
        placed = place(params, None if shardings is None else shardings.params)
        return jax.jit(lambda p: init_train_state(p, optimizer), out_shardings=shardings)(placed), None
    abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)
    if shardings is not None:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    on_damaged = faults.on_damaged_checkpoint
    state, extra, step = restore_newest_state(directory, abstract, step=step, on_damaged=on_damaged)
    loader.set_state(extra["loader"])
    if "skips" in extra:
        skips.set_state(extra["skips"])
    return state, step


def _compile(
    step_fn: Any, state: TrainState, batch: FusionBatch, shardings: Any, *, limited: bool
) -> tuple[Any, float, int]:
    began = time.perf_counter()
    out = None if shardings is None else (shardings, None)
    given = (state, batch, np.float32(0)) if limited else (state, batch)
    compiled = jax.jit(step_fn, donate_argnums=0, out_shardings=out).lower(*given).compile()
    memory = compiled.memory_analysis()
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
    peak = sum(getattr(memory, name, 0) for name in sizes) - getattr(memory, "alias_size_in_bytes", 0)
    return compiled, time.perf_counter() - began, int(peak)


def _reporter(
    writer: MetricsWriter | None, log_every: int, total: int, schedule: Any, annotate: Any, on_step: Any
) -> Callable[[int, Values], None]:
    def report(step: int, values: Values) -> None:
        if schedule is not None:
            values["learning_rate"] = float(schedule(step - 1))
        if annotate is not None:
            values |= annotate(values)
        if writer is not None and (step % log_every == 0 or step == total):
            writer.write(step, {k: v for k, v in values.items() if k != "step"})
        if on_step is not None:
            on_step(step, values)

    return report
