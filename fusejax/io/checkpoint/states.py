"""The steps of a run: `directory/<step>`, each there at once or not at all.

Orbax commits a step by renaming it; its seal, the digests of its files, is written after that and removed before
anything else of it is. Only a step that is sealed is one: what a kill leaves between commit and seal is as
good as half written, because nothing could tell a flipped bit in it. The steps before it are removed when it is
sealed, so there always is one to go on from.

`StateWriter` writes in the background: `save` waits for the save before it, takes the checksums, copies the state
(the train step donates it) and returns; Orbax writes and commits in its threads. On 200 MB and two busy CPU cores the
loop stands still for 1.0 s per save instead of 3.0 s (`benchmarks/checkpoint_stall.py`). What a save fails with is
raised by the next `check`, `save` or `wait`. While a state is written it needs its size again in host memory.

In a job of several processes all call every function here, in the same order; the first one's view of the directory
counts, because a shared file system does not show everybody the same at once. They wait for each other in barriers
that end, never in a collective.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.io.checkpoint.checksums import (
    DIGESTS,
    DamagedCheckpoint,
    compare,
    damaged_files,
    describe,
    seal,
    sealed_json,
    unsealed_json,
    verify,
)
from fusejax.io.checkpoint.guards import explained, quiet, silenced, writable
from fusejax.parallel.processes import barrier, collect, is_first

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp

__all__ = [
    "StateWriter",
    "all_steps",
    "drop_steps_after",
    "latest_step",
    "remove_orphans",
    "restore_newest_state",
    "restore_train_state",
    "save_train_state",
]

log = logging.getLogger("fusejax")
TEMPORARY = ".orbax-checkpoint-tmp"
_ASIDE = ".damaged"
_WAIT_SECONDS = 300.0
_READ_SECONDS = 1200.0  # between the first process that has read its part of a state and the last
_CLEAR_SECONDS = 10.0


class StateWriter:
    """Saves train states of one run; a context manager that waits for what is being written.

    Args:
        directory: holds the steps of the run; made where absent. What killed saves left there is removed and logged.
        keep: newest steps that stay once a newer one is sealed; None keeps all.
        background: False returns from `save` when the step is committed.

    Raises:
        InputError: `keep` below 1, or a directory that cannot be written.
    """

    def __init__(self, directory: str | Path, *, keep: int | None = 2, background: bool = True):
        if keep is not None and keep < 1:
            raise InputError(f"keep must be at least 1 checkpoint or None, got {keep}.")
        self._directory, self._background, self._keep = Path(directory).absolute(), background, keep
        self._writing: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._failed = False
        remove_orphans(self._directory)
        barrier(f"orphans {self._directory}", seconds=_WAIT_SECONDS)
        self._manager = _manager(self._directory, background=background)
        self._commit = self._manager.wait_until_finished

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Begins to save a pytree of arrays as `directory/step`.

        Args:
            step: number of optimiser steps done.
            state: pytree of jax or numpy arrays, sharded as they are; may be donated or changed afterwards.
            extra: JSON kept in the same commit (data position, versions).

        Raises:
            InputError: there is this step or a later one, or the directory cannot be written. OSError: the disk is
                full, now or when the save before this one was written.
        """
        self.wait()
        if (steps := all_steps(self._directory)) and step <= steps[-1]:
            raise InputError(
                f"{self._directory} already holds step {steps[-1]}; resume from it or take another directory."
            )
        record = sealed_json({"leaves": describe(state), "extra": extra or {}})
        state = _copied(state) if self._background else state
        items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
        with self._guarded():
            if step <= (self._manager.latest_step() or -1):
                self._manager.reload()  # the run went back: else Orbax leaves out, without a word, what it has seen
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._writing = step
        self._thread = threading.Thread(target=self._await, name="fusejax-checkpoint")
        self._thread.start()
        if not self._background:
            self.wait()

    def check(self) -> None:
        """Raises what the save in the background failed with, if it did; costs microseconds."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is committed; raises what failed."""
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(0.5)  # wakes up for Python's signal handlers
        self._thread, failure, self._failure = None, self._failure, None
        with self._guarded():
            if failure is not None:
                self._failed = True
                raise failure

    def close(self) -> None:
        """Waits and lets go of the directory."""
        try:
            self.wait()
        finally:
            # Orbax raises a failure once more here; it has been told.
            with quiet(), contextlib.suppress(*([Exception] if self._failed else [])):
                self._manager.close()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _await(self) -> None:
        try:
            with silenced():  # also what Orbax's own threads have to say meanwhile
                self._commit()
            if is_first():
                seal(self._directory / str(self._writing))
                for step in all_steps(self._directory)[: -self._keep] if self._keep else []:
                    _remove_step(self._directory / str(step))
        except Exception as error:  # raised in the caller's thread
            self._failure = error

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        with quiet(), writable(self._directory, clear=self._clear):
            yield

    def _clear(self) -> None:
        """Removes what a failed save left, until the writers of its other files have ended, too."""
        deadline, clean = time.monotonic() + _CLEAR_SECONDS, 0
        while clean < 2 and time.monotonic() < deadline:
            clean = 0 if remove_orphans(self._directory) else clean + 1
            time.sleep(0.1)


def save_train_state(
    directory: str | Path, step: int, state: Any, extra: dict[str, Any] | None = None, *, keep: int | None = 2
) -> None:
    """Saves one state and returns when it is committed; see `StateWriter`."""
    with StateWriter(directory, keep=keep, background=False) as writer:
        writer.save(step, state, extra)


def restore_train_state(directory: str | Path, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict]:
    """Restores a saved state onto the shardings of `abstract_state` and verifies every leaf and every small file.

    Args:
        directory: as given to `save_train_state`.
        abstract_state: pytree of `jax.ShapeDtypeStruct`s (with shardings on a mesh) or arrays, like the saved one.
        step: which checkpoint; None takes the newest.

    Returns:
        (state, extra).

    Raises:
        InputError: no such step; leaves, shapes or dtypes that differ (all are listed).
        DamagedCheckpoint: damaged leaves (all are named), or other files.
    """
    directory = Path(directory).absolute()
    steps = all_steps(directory)
    step = _first_says(steps[-1] if steps and step is None else step)
    if step is None or (is_first() and step not in steps):
        raise InputError(f"no checkpoint of step {step if steps else '(any)'} in {directory}; found steps {steps}.")
    place = directory / str(step)
    try:
        state, record = _read(directory, step, abstract_state)
        verify(record["leaves"], state, place)
    except DamagedCheckpoint as error:
        files = damaged_files(place)
        raise DamagedCheckpoint(f"{error} Changed files: {', '.join(files)}" if files else str(error)) from error
    _all_agree(damaged_files(place) if is_first() else [], place)
    return state, record["extra"]


def restore_newest_state(
    directory: str | Path,
    abstract_state: Any,
    *,
    step: int | None = None,
    on_damaged: Literal["stop", "previous"] = "stop",
) -> tuple[Any, dict, int]:
    """Restores as `restore_train_state`, and with `on_damaged="previous"` goes back over damaged steps.

    A step that was gone back over is logged and kept as `<step>.damaged`, so that the run can save that step again.

    Returns:
        (state, extra, the step that was restored).
    """
    directory = Path(directory).absolute()
    while True:
        wanted = latest_step(directory) if step is None else step
        try:
            state, extra = restore_train_state(directory, abstract_state, step=wanted)
        except DamagedCheckpoint as error:
            earlier = [found for found in all_steps(directory) if wanted is not None and found < wanted]
            step = _first_says(earlier[-1] if earlier else None)
            if on_damaged != "previous" or step is None:
                raise
            log.error("%s\nGOING BACK to step %d, as faults.on_damaged_checkpoint says", error, step)
            _set_aside(directory, int(wanted or 0))
        else:
            return state, extra, int(wanted or 0)


def all_steps(directory: str | Path) -> list[int]:
    """Returns the steps that are there whole, in ascending order, [] where there are none."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and _sealed(entry))


def latest_step(directory: str | Path) -> int | None:
    """Returns the newest step that is there whole, or None."""
    steps = all_steps(directory)
    return _first_says(steps[-1] if steps else None)


def drop_steps_after(directory: str | Path, step: int) -> list[int]:
    """Removes the checkpoints of steps beyond `step`, for a run that goes back; returns and logs them."""
    dropped = [found for found in all_steps(directory) if found > step]
    for found in dropped if is_first() else []:
        log.warning("removing the checkpoint of step %d in %s: the run goes back to step %d", found, directory, step)
        _remove_step(Path(directory) / str(found))
    barrier(f"drop steps {directory}", seconds=_WAIT_SECONDS)
    return dropped


def remove_orphans(directory: str | Path) -> list[Path]:
    """Removes what a killed save left in a checkpoint directory; returns and logs what was removed."""
    directory = Path(directory)
    if not directory.is_dir() or not is_first():
        return []
    unsealed = {entry for entry in directory.iterdir() if entry.name.isdigit() and not _sealed(entry)}
    orphans = sorted(unsealed | {entry for entry in directory.iterdir() if TEMPORARY in entry.name})
    for orphan in orphans:
        size = sum(path.stat().st_size for path in orphan.rglob("*") if path.is_file())
        what = "that was not sealed" if orphan in unsealed else "that did not finish"
        log.warning("removing %s (%.1f MB), left by a save %s", orphan, size / 1e6, what)
        shutil.rmtree(orphan, ignore_errors=True)
    return orphans


def _sealed(place: Path) -> bool:
    return (place / DIGESTS).is_file()


def _remove_step(place: Path) -> None:
    (place / DIGESTS).unlink()  # a kill in the middle leaves an orphan
    shutil.rmtree(place)


def _manager(directory: Path, *, background: bool = False) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=background)
    with quiet(), writable(directory, clear=lambda: None):
        return ocp.CheckpointManager(directory, options=options)


def _read(directory: Path, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    place, state, record, problem = directory / str(step), None, {}, None
    try:
        with quiet(), _manager(directory) as manager:
            with explained(place):
                found = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            record = unsealed_json(found, place)
            compare(record["leaves"], abstract_state, place)
            with explained(place):
                target = jax.tree.map(_abstract, abstract_state)
                state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    except DamagedCheckpoint as error:
        problem = error
    _all_agree([] if problem is None else [str(problem)], place)
    return state, record


def _all_agree(problems: list[str], place: Path) -> None:
    """Raises in all processes where one has found damage: else the others would wait for it."""
    told = collect(f"damage of {place}", problems[:20], seconds=_READ_SECONDS)
    if found := dict.fromkeys(problem for of_one in told for problem in of_one):
        raise DamagedCheckpoint(f"{place} is damaged, nothing was loaded: {'; '.join(found)}")


def _first_says(step: int | None) -> int | None:
    """Returns the value of the first process, in all of them."""
    return collect("step to restore", step, seconds=_WAIT_SECONDS)[0]


def _set_aside(directory: Path, step: int) -> None:
    if is_first():
        aside = directory / f"{step}{_ASIDE}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory / str(step), aside)
    barrier(f"set aside {directory}", seconds=_WAIT_SECONDS)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _copied(state: Any) -> Any:
    """A state that stays what it is when the original is donated.

    Orbax copies from an accelerator to the host before `save` returns; a CPU's arrays are in the host's memory
    already, and what it takes for a copy is the array itself.
    """
    if jax.default_backend() == "cpu":
        return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else np.array(x), state)
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), state)
