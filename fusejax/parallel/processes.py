"""Several processes, one job: starting them, who is first, and barriers that end.

A process is told who it is by arguments, by environment variables (`start_processes` lists them) or, when
FUSEJAX_DISTRIBUTED=auto asks for it, by what JAX finds out under SLURM, Kubernetes or on a TPU pod. Nothing is
detected unasked: a SLURM shell also sets the variables that JAX looks for. One process is the normal case; then
nothing is started and every function here answers at once.

Two answers of JAX's detection are not taken as they are. It gives every SLURM task the one GPU with its local number,
so that one task on a node of eight uses an eighth of it: here the tasks of a node share its GPUs evenly. And
it reads some lists of nodes wrongly (`gpu[01-02]-ib`): such lists are refused, FUSEJAX_COORDINATOR names the first.

Barriers go through JAX's coordination service, which runs no collective: it works between processes that are at
work on different things, and notices one that died. The wait is in a thread, so that the main thread still answers
signals. What is waited for may take days, so no fixed time bounds it but progress: each process counts what it has
done in the same service (`tell_progress`), and who waits gives up when no other has counted on for a while.

Not here: what happens to the others when one process fails (the launcher and `fusejax.train`), and elasticity.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fusejax.errors import InputError, Stuck

__all__ = [
    "barrier",
    "collect",
    "is_first",
    "process_count",
    "process_index",
    "start_processes",
    "tell_progress",
]

_COORDINATOR, _COUNT, _INDEX = "FUSEJAX_COORDINATOR", "FUSEJAX_PROCESSES", "FUSEJAX_PROCESS"
_DEVICES, _MODE = "FUSEJAX_LOCAL_DEVICES", "FUSEJAX_DISTRIBUTED"
_SHUTDOWN_SECONDS = 30  # processes end within a barrier's width of each other; the default of 300 only delays failures
_HEARTBEAT_SECONDS = 100  # after which one that was killed, or whose machine is gone, is given up; JAX's default
_BACKSTOP_SECONDS = 20 * 86_400  # of a barrier in the service, which wants a time; as long as it can count
_PROGRESS = "fusejax/progress/"


def start_processes(
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    local_devices: Sequence[int] | None = None,
    timeout: int = 300,
) -> int:
    """Joins the processes of a job, once, before anything uses a device; returns their number.

    Each argument that is None is read from the environment. Where nothing is given there is one process.

    Args:
        coordinator: "host:port" of process 0, reachable from all (FUSEJAX_COORDINATOR).
        count, index: number of processes, and which one this is, from 0 (FUSEJAX_PROCESSES, FUSEJAX_PROCESS).
        local_devices: which GPUs of those that this process sees are its own (FUSEJAX_LOCAL_DEVICES=0,1,2,3);
            None: all, or under SLURM the task's share of the node's.
        timeout: seconds to wait for the other processes.

    Raises:
        InputError: settings that are incomplete, contradict each other or are not of the form above.
    """
    environment = os.environ
    coordinator = coordinator or environment.get(_COORDINATOR) or None
    count = _whole(environment, _COUNT) if count is None else count
    index = _whole(environment, _INDEX) if index is None else index
    local_devices = _ids(environment.get(_DEVICES)) if local_devices is None else list(local_devices)
    mode = environment.get(_MODE) or ""
    if mode not in ("", "auto"):
        raise InputError(f"{_MODE} is {mode!r}; 'auto' asks JAX to find the processes, unset it to give them")
    if not mode:
        if coordinator is None and count in (None, 1) and index in (None, 0):
            return 1
        _check(coordinator, count, index)
    elif "SLURM_JOB_ID" in environment:
        local_devices = _slurm_devices(environment) if local_devices is None else local_devices
        coordinator = coordinator or _checked_node_list(environment)
    return _initialize(coordinator, count, index, local_devices, timeout, detect=bool(mode))


def process_index() -> int:
    """Returns the number of this process, from 0; 0 where there is one."""
    return _state().process_id if process_count() > 1 else 0


def process_count() -> int:
    """Returns the number of processes; no device is touched to find out."""
    state = _state()
    return 1 if state is None or state.client is None else int(state.num_processes)


def is_first() -> bool:
    """Returns whether this process is the one that does what is done once."""
    return process_index() == 0


def tell_progress(count: int) -> None:
    """Says to the processes that wait for this one how many pieces of work it has done; nothing where nobody hears."""
    if process_count() > 1:
        with contextlib.suppress(Exception):  # no coordinator: JAX's own heartbeat deals with that
            _state().client.key_value_set(f"{_PROGRESS}{process_index()}", str(count), allow_overwrite=True)


def barrier(name: str, *, seconds: float) -> None:
    """Returns when every process has called it with this name, the n-th call of one with the n-th of the others.

    Args:
        name: tells this place in the program from others.
        seconds: how long to wait while no other process gets on, by what they say with `tell_progress`.

    Raises:
        Stuck: nothing moves; the text names the barrier and the processes that are missing.
        RuntimeError: a process that was waited for has died.
    """
    if process_count() == 1:
        return
    client, place = _state().client, f"fusejax/barrier/{name}"
    _passed[name] = _passed.get(name, 0) + 1
    client.key_value_set(f"{place}/{process_index()}", str(_passed[name]), allow_overwrite=True)
    failed: list[Exception] = []

    def wait() -> None:
        try:
            client.wait_at_barrier(place, _BACKSTOP_SECONDS * 1000)
        except Exception as error:  # raised again below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=wait, name=f"fusejax-barrier-{name}", daemon=True)
    thread.start()
    said, moved = _progress(), time.monotonic()
    looked, interval = moved, min(10.0, seconds / 20)  # many processes ask one
    while thread.is_alive():
        thread.join(min(0.5, seconds / 4))  # wakes up for Python's signal handlers
        if (now := time.monotonic()) - looked > interval:
            looked = now
            if (says := _progress()) != said:
                said, moved = says, now
            if now - moved > seconds and thread.is_alive():
                raise Stuck(_missing(name, seconds, place))
    if failed:
        text = str(failed[0]).strip().splitlines()[0]
        raise RuntimeError(f"barrier {name!r} failed: {text}") from failed[0]


def collect(name: str, value: Any, *, seconds: float) -> list[Any]:
    """Returns every process's `value` in the order of their numbers; like `barrier`, all call it.

    Args:
        name: tells this place in the program from others.
        value: JSON of at most a megabyte or so: counts, not data.
        seconds: as of `barrier`.

    Raises:
        Stuck, RuntimeError: as `barrier`.
    """
    if process_count() == 1:
        return [value]
    client, place = _state().client, f"fusejax/collect/{name}/{_passed.get(name, 0)}"
    client.key_value_set(f"{place}/{process_index()}", json.dumps(value))
    barrier(name, seconds=seconds)
    found = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get(place + "/")}
    return [found[rank] for rank in range(process_count())]


_passed: dict[str, int] = {}  # times that each barrier was reached by this process
_starting = threading.Event()


def _progress() -> dict[str, str]:
    """What the other processes have said of their progress; {} where the coordinator does not answer."""
    try:
        said = dict(_state().client.key_value_dir_get(_PROGRESS))
    except Exception:
        return {}
    return {key: count for key, count in said.items() if key != f"{_PROGRESS}{process_index()}"}


def _missing(name: str, seconds: float, place: str) -> str:
    try:
        arrived = {int(key.rsplit("/", 1)[1]): int(n) for key, n in _state().client.key_value_dir_get(place + "/")}
        missing = [rank for rank in range(process_count()) if arrived.get(rank, 0) < _passed[name]]
    except Exception:  # the coordinator is gone too: say what is known
        missing = []
    who = f"process {', '.join(map(str, missing))} did not come" if missing else "not all processes came"
    return (
        f"barrier {name!r}: {who}, and no other process has got on for {seconds:g} s; look at its output. "
        "FUSEJAX_WAIT_SECONDS sets how long that may be"
    )


def _state() -> Any:
    """JAX's record of the job; None before it is whole: asking a client that is not connected ends the process."""
    if "jax" not in sys.modules or _starting.is_set():
        return None
    from jax._src import distributed  # the public functions would start the devices

    return distributed.global_state


def _initialize(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    local_devices: list[int] | None,
    timeout: int,
    *,
    detect: bool,
) -> int:
    import jax

    if jax.distributed.is_initialized():
        return process_count()
    _starting.set()
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=local_devices,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise InputError(
            f"{_MODE}=auto, but JAX finds no processes here ({error}); start them with srun, or set {_COORDINATOR}, "
            f"{_COUNT} and {_INDEX}"
        ) from error
    finally:
        _starting.clear()
    if threading.current_thread() is threading.main_thread():
        # JAX has put a handler in place that answers SIGTERM with silence; whoever had it has it back.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    # The devices are started together, now: they wait for each other two minutes only.
    jax.devices()
    return process_count()


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    missing = [name for name, value in ((_COORDINATOR, coordinator), (_COUNT, count), (_INDEX, index)) if value is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} must be set too: several processes need the address of the first, their number "
            f"and which one this is. Or {_MODE}=auto under SLURM, Kubernetes or on a TPU pod"
        )
    if not re.fullmatch(r".+:\d+", coordinator or ""):
        raise InputError(f"{_COORDINATOR} is {coordinator!r}, expected host:port of process 0")
    if not 0 <= (index or 0) < (count or 0):
        raise InputError(f"{_INDEX} is {index}, expected 0 to {(count or 0) - 1}: {_COUNT} is {count}")


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r}, expected a whole number")
    return int(text)


def _ids(text: str | None) -> list[int] | None:
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise InputError(f"{_DEVICES} is {text!r}, expected different device numbers such as 0,1,2,3")
    return [int(part) for part in parts]


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the GPUs of a SLURM task, as numbers among those it sees; None where it sees none.

    Raises:
        InputError: the tasks of a node cannot share its GPUs evenly.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else _whole(environment, "SLURM_GPUS_ON_NODE") or 0
    if not gpus:
        return None
    if gpus == 1 and visible:
        return [0]  # SLURM has bound the task to its own
    tasks = re.match(
        r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    )
    on_node = int(tasks[0]) if tasks else _whole(environment, "SLURM_NTASKS_PER_NODE") or 1
    if gpus % on_node:
        raise InputError(
            f"{on_node} SLURM tasks cannot share the {gpus} GPUs of a node evenly; start one task per GPU "
            f"(--ntasks-per-node={gpus}), or set {_DEVICES} for each task"
        )
    share, first = gpus // on_node, _whole(environment, "SLURM_LOCALID") or 0
    return list(range(first * share, (first + 1) * share))


def _checked_node_list(environment: Mapping[str, str]) -> None:
    """Refuses lists of nodes whose first name JAX gets wrong: text after a bracket, or two brackets."""
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if re.match(r"[^,\[]*\[[^\]]*\][^,]", nodes):
        raise InputError(
            f"JAX cannot read the first node from SLURM_STEP_NODELIST={nodes}; set {_COORDINATOR}="
            '"$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1):12345"'
        )
