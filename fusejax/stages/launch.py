"""launch: several processes of one fusejax command on this machine.

    fusejax launch local --procs 2 --devices 4 run config.yaml --json

starts the command twice, as processes 0 and 1 of one job with four devices each: on GPUs four of the machine's to
each, on CPU four virtual ones. On clusters SLURM, Kubernetes or the TPU's own tools start the processes
(`scripts/`); they tell each who it is by the same environment variables (`fusejax.parallel.processes`).

Process 0's standard output passes through; everything else comes on standard error, each line with its process
in front. SIGTERM and SIGINT go to all. When a process fails its exit code becomes the launcher's. The others mostly
leave by themselves (`fusejax.train.faults`); those that have not after `--grace` seconds are killed. After 85
(preempted, saved) they have the time to save, too. Should the launcher itself be killed, Linux ends them with it.
"""

__all__ = ["command", "launch_local"]

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from fusejax.errors import PREEMPTED, InputError
from fusejax.stages.command import Result, parser, positive_int

_AGREED_GRACE = 120.0  # to save, when all processes were asked to stop
_PR_SET_PDEATHSIG = 1


def command(name: str, words: list[str]) -> Result:
    """`fusejax launch local --procs N [--devices M] COMMAND ...`"""
    arguments = parser(name, "Start several processes of one fusejax command on this machine.")
    arguments.usage = "fusejax launch local --procs N [--devices M] [--grace S] COMMAND [options of the command]"
    arguments.add_argument("where", choices=("local",), help="this machine; clusters: see scripts/")
    arguments.add_argument("--procs", type=positive_int, required=True, help="number of processes")
    arguments.add_argument("--devices", type=positive_int, default=1, help="devices of each process (default 1)")
    arguments.add_argument("--grace", type=float, default=10.0, help="seconds for the others after a failure")
    split = _command_at(words)
    given, inner = arguments.parse_args(words[:split]), [word for word in words[split:] if word != "--"]
    if not inner or inner[0] == "launch":
        raise InputError(f"launch needs the command to start, such as `run config.yaml`\nusage: {arguments.usage}")
    code = launch_local(
        [sys.executable, "-m", "fusejax", *inner], procs=given.procs, devices=given.devices, grace=given.grace
    )
    return Result({}, "", code)


def launch_local(arguments: Sequence[str], *, procs: int, devices: int = 1, grace: float = 10.0) -> int:
    """Runs a program as `procs` processes of one job on this machine and returns the job's exit code.

    Args:
        arguments: the program and its arguments.
        procs: number of processes.
        devices: devices of each process.
        grace: seconds that the others are given to leave after one has failed.
    """
    port = _free_port()
    ranks = [_Rank(arguments, rank, _environment(rank, procs, devices, port)) for rank in range(procs)]
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in previous:
        signal.signal(number, lambda received, _: [rank.send(received) for rank in ranks])
    try:
        failed = _wait(ranks, grace)
    finally:
        for rank in ranks:
            rank.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failed is None:
        return 0
    _write(f"fusejax launch: process {failed.number} was the first to end, with exit code {failed.code}")
    return failed.code


class _Rank:
    """One process and the threads that hand its output on."""

    def __init__(self, arguments: Sequence[str], number: int, environment: dict[str, str]):
        self.number = number
        self._process = subprocess.Popen(
            list(arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C reaches the launcher alone, which hands it on once
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            text=True,
            errors="replace",
        )
        pipes = [pipe for pipe in (self._process.stdout, self._process.stderr) if pipe is not None]
        self._threads = [threading.Thread(target=self._hand_on, args=(pipe,), daemon=True) for pipe in pipes]
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int:
        """Exit code; 128 + n where signal n ended it."""
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: int) -> None:
        if self.running():
            self._process.send_signal(number)

    def kill(self) -> None:
        """Ends the process if it runs, and takes in the rest of its output."""
        self.send(signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)

    def _hand_on(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                _write(f"[{self.number}] {line.rstrip()}")


def _wait(ranks: list[_Rank], grace: float) -> _Rank | None:
    """Waits for all; returns the first that failed. The others are then given `grace` seconds."""
    failed, deadline = None, 0.0
    while any(rank.running() for rank in ranks):
        if failed is None:
            failed = next((rank for rank in ranks if not rank.running() and rank.code), None)
            if failed is not None:
                deadline = time.monotonic() + (_AGREED_GRACE if failed.code == PREEMPTED else grace)
        elif time.monotonic() > deadline:
            for rank in ranks:
                rank.send(signal.SIGKILL)
        time.sleep(0.05)
    return failed or next((rank for rank in ranks if rank.code), None)


def _environment(rank: int, procs: int, devices: int, port: int) -> dict[str, str]:
    """The environment of one process: who it is, and which devices are its own."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()
    own = range(rank * devices, (rank + 1) * devices)
    given = {
        "FUSEJAX_COORDINATOR": f"127.0.0.1:{port}",
        "FUSEJAX_PROCESSES": str(procs),
        "FUSEJAX_PROCESS": str(rank),
        "FUSEJAX_LOCAL_DEVICES": ",".join(map(str, own)),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": flags,
        "PYTHONUNBUFFERED": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "FUSEJAX_DISTRIBUTED"} | given


def _command_at(words: list[str]) -> int:
    """Where the words of the command begin: after `local`, the options and their values."""
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--":
            return index
        if word.startswith("-"):
            index += 1 if "=" in word or word in ("-h", "--help") else 2
        elif word == "local" or index == 0:
            index += 1
        else:
            return index
    return len(words)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_lock = threading.Lock()


def _write(line: str) -> None:
    """Writes one whole line to standard error; lines of different processes do not mix."""
    with _lock:
        print(line, file=sys.stderr, flush=True)
