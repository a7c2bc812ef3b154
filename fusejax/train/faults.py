"""What stops a run from outside, and what is left of it then: signals, a stuck process, a process that failed.

`guarded` is entered once, around a command. Until it is left,

* SIGTERM raises `Preempted` (exit 85) and SIGINT `KeyboardInterrupt` (130) at once: every artefact outlives a kill.
  Where the main thread does not answer (it may be compiling for minutes), the process leaves all the same.
* between `Guard.training` and its end nothing is raised: the loop asks `must_stop` after every step, saves and raises
  `Preempted`. A second SIGINT does raise; checkpoints are committed at once or not at all, so it spoils none.
* with `watchdog_seconds`, a step that does not end in that time (other phases and stages, between two pieces of work
  that they count: three times that) prints the stacks of all threads, with rank, step and phase, and exits with 75.

Several processes are told of each other's signals by notices in the coordination service. They agree on the step
after which all stop: each says how far it is, while its loop is held, and the farthest counts. A process that fails
says so and lets the others go first, so that its traceback is the last that is printed (`leave`). The coordinator
goes last of all, because JAX aborts whoever loses it.

Not done: JAX's own preemption service, which answers SIGTERM alone, and not before the first step; and a watchdog
without the interpreter (one that holds the interpreter's lock for ever is found by its peers).
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from fusejax.errors import PREEMPTED, WATCHDOG, Preempted
from fusejax.io.progress import last_beat
from fusejax.parallel.notices import post, read
from fusejax.parallel.processes import process_count, process_index

__all__ = ["FaultPolicy", "Guard", "active_guard", "guarded", "leave"]

_INTERRUPTED = 130
_OTHER_PHASES = 3  # times the limit of a step: compiling, evaluating, saving, a batch of another stage
_POLL = 0.25  # seconds between looks at notices and the clock
_PATIENCE = 5.0  # seconds that the main thread has to answer a signal where nothing would be lost
_OTHERS = 8.0  # seconds that are waited for other processes on the way out
_AGREEMENT = 120.0  # seconds for all to say how far they are


class FaultPolicy(NamedTuple):
    """What a training run does when something goes wrong; see `fusejax.config.FaultsConfig`."""

    watchdog_seconds: float | None = None
    max_skipped_steps: int = 0
    spike_factor: float | None = None
    on_damaged_checkpoint: Literal["stop", "previous"] = "stop"
    on_changed_settings: Literal["stop", "restart"] = "stop"


class _Request(NamedTuple):
    number: int  # of the signal
    when: float

    @property
    def code(self) -> int:
        return _INTERRUPTED if self.number == signal.SIGINT else PREEMPTED


class Guard:
    """Watches over one process; `Guard()` itself is idle, `guarded` makes one that works."""

    def __init__(self) -> None:
        self.request: _Request | None = None
        self._training = self._closed = False
        self._ended = False  # whether a signal was to end the command where it was
        self._interrupts = 0  # times that SIGINT has come
        self._watchdog: float | None = None
        self._phase, self._step, self._since = "starting", None, time.monotonic()
        self._at, self._stop_at = 0, None
        self._held = threading.Lock()  # while it is held, this process takes no further step
        self._wake: socket.socket | None = None

    @contextlib.contextmanager
    def watching(self, seconds: float | None) -> Iterator[None]:
        """Arms the watchdog while the block runs, or disarms it; afterwards it is as before."""
        before = self._watchdog, self._phase, self._step
        self.attend("starting", self._step)
        self._watchdog = seconds
        try:
            yield
        finally:
            self.attend(*before[1:])
            self._watchdog = before[0]

    @property
    def patience(self) -> float | None:
        """Seconds that one piece of work may take, a training step excepted; None where the watchdog is not armed."""
        return None if self._watchdog is None else _OTHER_PHASES * self._watchdog

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Signals wait for `must_stop` while the block runs; one that came too late for it is raised at the end."""
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self.request is not None:
            raise self.preempted("the training was finished before")

    def attend(self, phase: str, step: int | None = None) -> None:
        """Tells the watchdog what begins now, after which step of a training."""
        self._phase, self._step, self._since = phase, step, time.monotonic()

    def must_stop(self, step: int) -> bool:
        """Returns whether to save and stop after `step`, the same in all processes; call it after every step."""
        if process_count() == 1:
            return self.request is not None
        with self._held:
            self._at = step
            return self._stop_at is not None and step >= self._stop_at

    def preempted(self, what: str) -> Preempted:
        """The exception that ends this run, as its signal asks for."""
        number, code = (self.request.number, self.request.code) if self.request else (signal.SIGTERM, PREEMPTED)
        return Preempted(f"stopped by {signal.Signals(number).name}: {what}; the same command goes on from here", code)

    def _on_signal(self, number: int, _: Any) -> None:
        """In the main thread, between two bytecodes."""
        self.request = self.request or _Request(number, time.monotonic())
        self._interrupts += number == signal.SIGINT
        if not self._training:
            self._ended = True
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise self.preempted("what was finished is kept")
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _run(self) -> None:
        """The guard's thread."""
        told = False
        while not self._closed:
            self._sleep()
            if self.request is not None and not told:
                told = True
                post("stop", str(int(self.request.number)))
            elif self.request is None and (notice := read("stop")):
                self.request = _Request(int(notice), time.monotonic())
                told = True
                if not self._training:  # let the main thread raise
                    signal.pthread_kill(threading.main_thread().ident or 0, int(notice))
            if notice := read("failed"):
                self._follow(notice)
            self._check_request()
            self._check_watchdog()

    def _sleep(self) -> None:
        """Waits for the next look, or for a signal: the bytes come even while the main thread is in C code."""
        if self._wake is None:
            time.sleep(_POLL)
            return
        ready, _, _ = select.select([self._wake], [], [], _POLL)
        numbers = self._wake.recv(64) if ready else b""
        for number in numbers:
            if self.request is None and number in (signal.SIGTERM, signal.SIGINT):
                self.request = _Request(number, time.monotonic())

    def _check_request(self) -> None:
        request = self.request
        if request is None or self._closed:
            return
        if self._training and process_count() > 1 and self._stop_at is None:
            self._agree()
        elif not self._training and time.monotonic() - request.when > _PATIENCE:
            leave(request.code, self.preempted(f"while {self._phase}, nothing was to be saved").message)

    def _agree(self) -> None:
        """Holds the loop, says how far it is and learns how far the others are."""
        with self._held:
            post(f"at/{process_index()}", str(self._at))
            deadline, steps = time.monotonic() + _AGREEMENT, {}
            while len(steps) < process_count():
                for rank in range(process_count()):
                    if rank not in steps and (found := read(f"at/{rank}")):
                        steps[rank] = int(found)
                    if rank not in steps and read(f"left/{rank}"):
                        leave(PREEMPTED, f"process {rank} has left before its first step; nothing was to be saved")
                if time.monotonic() > deadline:
                    missing = sorted(set(range(process_count())) - set(steps))
                    leave(WATCHDOG, f"asked to stop, but process {missing} does not say how far it is")
                time.sleep(_POLL / 5)
            self._stop_at = max(steps.values()) + 1

    def _check_watchdog(self) -> None:
        if self._watchdog is None:
            return
        limit = self._watchdog * (1 if self._phase == "stepping" else _OTHER_PHASES)
        if time.monotonic() - max(self._since, last_beat()) > limit:
            leave(WATCHDOG, f"{self._where()} and has not got on for {limit:g} s: stuck", stacks=True)

    def _follow(self, notice: str) -> None:
        """Leaves because another process has failed."""
        rank, code, text = notice.split(" ", 2)
        if int(rank) != process_index():
            leave(int(code), f"process {rank} has failed ({text})", stacks=int(code) == WATCHDOG, after=int(rank))

    def _where(self) -> str:
        rank = f"process {process_index()} of {process_count()}"
        return f"{rank} is {self._phase}" + ("" if self._step is None else f" after step {self._step}")


_active: list[Guard] = []


def active_guard() -> Guard:
    """Returns the guard of the command that is running; an idle one where there is none."""
    return _active[-1] if _active else Guard()


@contextlib.contextmanager
def guarded() -> Iterator[Guard]:
    """Watches over this process while the block runs; inside another `guarded` it is that one.

    Signals are Python's to handle only in the main thread; from another, only the watchdog and notices work.
    """
    if _active:
        yield _active[-1]
        return
    guard = Guard()
    _active.append(guard)
    with contextlib.ExitStack() as stack:
        stack.callback(_active.clear)
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_handlers(guard))
        thread = threading.Thread(target=guard._run, name="fusejax-guard", daemon=True)
        thread.start()
        try:
            yield guard
        except Exception as error:
            # `Preempted`, raised between two bytecodes of a finaliser, is dropped by Python. What fails then, because
            # the other processes have ended as they were asked to, is no failure.
            if guard._ended:
                raise guard.preempted("what was finished is kept") from error
            raise
        finally:
            guard._closed = True
            thread.join(_POLL * 4)


@contextlib.contextmanager
def _handlers(guard: Guard) -> Iterator[None]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, guard._on_signal) for number in numbers}
    woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    guard._wake = ours
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        guard._wake = None
        theirs.close()
        ours.close()


def leave(
    code: int,
    message: str = "",
    *,
    error: BaseException | None = None,
    stacks: bool = False,
    after: int | None = None,
) -> None:
    """Ends this process at once, without Python's or JAX's farewells, which wait for processes that are gone.

    Args:
        code: the exit code; with several processes one that is neither 85 nor 130 makes the others leave, too.
        message: one line for standard error.
        error: its traceback is printed last, when the other processes have said what they have to say.
        stacks: print the stacks of all threads.
        after: the process whose failure this follows; it ends first.
    """
    mine, others = process_index(), [rank for rank in range(process_count()) if rank != process_index()]
    if after is None and code not in (PREEMPTED, _INTERRUPTED):
        post("failed", f"{mine} {code} {type(error).__name__ if error else message}")
    if message:
        print(f"fusejax: {message}", file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    post(f"said/{mine}", "1")
    if error is not None:
        _await("said", others)
        sys.stdout.flush()
        traceback.print_exception(error)
    sys.stderr.flush()
    if after is not None:
        _await("left", [after])
    post(f"left/{mine}", "1")
    if mine == 0:
        _await("left", others)
        time.sleep(_POLL)  # a process that has said so still needs a moment to end
    sys.stdout.flush()
    os._exit(code)


def _await(what: str, ranks: list[int]) -> None:
    deadline = time.monotonic() + _OTHERS
    waiting = list(ranks)
    while waiting and time.monotonic() < deadline:
        waiting = [rank for rank in waiting if read(f"{what}/{rank}") is None]
        time.sleep(0.05 if waiting else 0.0)
