"""How the stages of one run are shared by several processes.

Shards are: shard i of an artefact is made by process i % n on its own devices, in one directory that all see, and
its bytes depend on its own documents alone. So the number of processes changes no byte, and a run that was killed
goes on with another number. Process 0 makes the directory before the others look at it, and closes the artefact
when every shard is there. What is not divided is done by process 0 while the others wait.

Who waits gives up when no other process gets on: a share may take days, one piece of it may not. The processes say how
far they are as they count their progress (`fusejax.io.progress`), and the limit is that of the watchdog, which ends the
one that is stuck (`fusejax.train.faults`), plus some seconds: its stacks should be told first.

With one process all of this is what the functions say, without the waiting.
"""

__all__ = ["close_together", "meet", "own_mesh", "own_shards", "shared_writer", "wait_seconds"]

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, Manifest, read_manifest
from fusejax.io.store import RecordWriter, unfinished_here
from fusejax.parallel.processes import barrier, collect, is_first, process_count, process_index
from fusejax.stages.context import Run
from fusejax.train.faults import active_guard

_WAIT = "FUSEJAX_WAIT_SECONDS"
_AN_HOUR = 3600.0  # where no watchdog is armed
_AFTER_THE_WATCHDOG = 15.0
_VISIBLE_SECONDS = 60.0  # a network file system shows a new file to other machines after some seconds


def wait_seconds() -> float:
    """How long processes wait for others that do not get on: FUSEJAX_WAIT_SECONDS, or what the watchdog allows.

    It is for one that is alive and stuck beyond its own watchdog's reach; one that dies is noticed by its heartbeat.
    """
    text = os.environ.get(_WAIT)
    if not text:
        return (active_guard().patience or _AN_HOUR) + _AFTER_THE_WATCHDOG
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"{_WAIT} is {text!r}, expected seconds above 0")
    return seconds


def meet(place: str) -> None:
    """Returns when all processes have come here.

    Raises:
      Stuck: another process does not get on.
    """
    seconds = wait_seconds()
    with active_guard().watching(None):  # the wait has its own bound
        barrier(place, seconds=seconds)


def own_shards(shards: Sequence[int]) -> list[int]:
    """Returns those of `shards` that are this process's to make."""
    return [shard for shard in shards if shard % process_count() == process_index()]


def own_mesh(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the mesh of this process's devices for work that is divided by shards.

    Rows are split over `data` and `fsdp`, so each device gets as many as on the whole mesh and computes the same
    bits; `tensor`, over which sums are split, stays as it is.

    Raises:
      InputError: the processes do not divide data * fsdp.
    """
    ways, own = process_count(), dict(sizes)
    if all(size == 1 for size in own.values()):
        return own
    for axis in ("data", "fsdp"):
        common = math.gcd(own[axis], ways)
        own[axis], ways = own[axis] // common, ways // common
    if ways > 1:
        raise InputError(
            f"mesh {dict(sizes)} cannot be divided among {process_count()} processes: data * fsdp must be a multiple "
            "of their number, and tensor fit into the devices of one"
        )
    return own


def shared_writer(run: Run, directory: Path, **identity: Any) -> RecordWriter:
    """Opens a `RecordWriter` of one artefact in every process; an artefact with other settings is replaced.

    Args:
      run: whose artefact it is.
      directory: on a file system that all processes share.
      identity: arguments of `RecordWriter`.

    Raises:
      InputError: this process does not see the directory that process 0 has made.
    """
    meet(f"seen {directory}")  # nobody looks at what is removed next
    writer = None
    if is_first():
        run.replace_stale(directory)
        writer = RecordWriter(directory, **identity)
    meet(f"open {directory}")
    if writer is None:
        _wait_for(lambda: unfinished_here(directory), f"{directory} as process 0 has made it")
        writer = RecordWriter(directory, **identity, joining=True)
    return writer


def close_together(
    writer: RecordWriter,
    shards: int,
    *,
    counts: Any = None,
    facts: Callable[[list[Any]], Mapping[str, Any]],
) -> Manifest:
    """Closes an artefact when every process has made its shards; returns the manifest in each.

    Args:
      writer: from `shared_writer`.
      shards: how many the artefact has.
      counts: JSON that this process has to say about its own shards.
      facts: makes the manifest's facts of what all processes had to say.
    """
    place = str(writer.directory)
    seconds = wait_seconds()
    with active_guard().watching(None):  # the wait has its own bound
        said = collect(f"made {place}", counts, seconds=seconds)
    if is_first():
        missing = [shard for shard in range(shards) if not writer.has(shard)]
        _wait_for(lambda: all(map(writer.has, missing)), f"shards {missing} of {place} that other processes have made")
        writer.finish(facts=facts(said))
    meet(f"close {place}")
    _wait_for((writer.directory / MANIFEST).is_file, f"{place}/{MANIFEST} that process 0 has written")
    return read_manifest(writer.directory)


def _wait_for(seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not seen():
        if time.monotonic() > deadline:
            raise InputError(
                f"process {process_index()} does not see {what}; `output` must lie on a file system that all processes "
                "share"
            )
        time.sleep(0.2)
