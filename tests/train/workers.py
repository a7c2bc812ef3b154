"""Runs trainings in processes of their own, which tests may kill.

`python -m tests.train.workers` imports everything once and then forks a child per job, before any thread or device
exists: a job costs one second and not four. A child runs `fusejax train` as the command line does (signals, exit
codes), with a toy in place of the stage. What a job does to itself is said by step: `{"5": "SIGTERM"}`.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.paths import ROOT

CANARY = "canary-5e21c0d9"  # stands where secrets do, and may appear nowhere
_SECRETS = dict.fromkeys(("FUSEJAX_API_KEY", "HF_TOKEN", "WANDB_API_KEY"), CANARY)


class Workers:
    """The process that forks jobs; a context manager."""

    def __init__(self, *modules: str) -> None:
        """Imports these modules, too, before anything is forked."""
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.train.workers", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # as the command line does; NPROC: threads in which faked devices wait for each other
            env=environment
            | _SECRETS
            | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_PREEMPTION_SERVICE": "false", "NPROC": "16"},
        )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate("", timeout=20)
        self._process.kill()

    def start(self, directory: Path, **options: Any) -> "Job":
        """Starts one process that trains in `directory`."""
        log = directory.with_name(f"{directory.name}.{options.get('rank', 0)}.log")
        pid = self._ask({"start": {"directory": str(directory), "log": str(log), **options}})
        return Job(self, pid, log)

    def run(self, directory: Path, **options: Any) -> tuple[int, str]:
        """Starts one process, waits for it and returns its exit code and what it printed."""
        job = self.start(directory, **options)
        return job.wait(), job.said()

    def pair(self, directory: Path, *, of_rank: dict[int, dict] | None = None, **options: Any) -> list["Job"]:
        """Starts two processes of one job; `of_rank` are options of one of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = options | {"port": port}
        return [self.start(directory, rank=rank, **options | (of_rank or {}).get(rank, {})) for rank in (0, 1)]

    def _ask(self, question: dict) -> int:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class Job:
    def __init__(self, workers: Workers, pid: int, log: Path):
        self.workers, self.pid, self.log = workers, pid, log

    def wait(self, seconds: float = 60.0) -> int:
        """Returns the exit code, negative for a signal; kills what takes longer."""
        return self.workers._ask({"wait": self.pid, "seconds": seconds})

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text()


def _serve() -> None:
    import fusejax.cli
    import fusejax.data.loader
    import fusejax.stages.command
    import fusejax.train.loop  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                _child(question["start"])
            print(pid, flush=True)
        else:
            print(_wait(question["wait"], question["seconds"]), flush=True)


def _wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def _child(options: dict) -> None:
    code = 1
    try:
        log = os.open(options["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for to, of in ((0, null), (1, log), (2, log)):
            os.dup2(of, to)
        from fusejax import cli

        code = cli.main(_stages(options) if "words" in options else _toy(options))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if code == 0 and "port" in options:
            import jax

            jax.distributed.shutdown()
        sys.stderr.flush()
        os._exit(code)


def _toy(options: dict) -> list[str]:
    """A toy of a training takes the place of the stages."""
    stage = types.ModuleType("fusejax.stages.run")
    stage.command = lambda name, words: _job(options)  # type: ignore[attr-defined]
    sys.modules[stage.__name__] = stage
    return ["train", "toy"]


def _stages(options: dict) -> list[str]:
    """The command line as it is; a job does `act` to itself at the first batch of a capture that finds a file."""
    from fusejax.stages import capture

    os.environ |= {"FUSEJAX_COORDINATOR": f"127.0.0.1:{options['port']}", "FUSEJAX_PROCESSES": "2"}
    os.environ["FUSEJAX_PROCESS"] = str(options["rank"])
    beat_as_ever = capture.beat

    def beat() -> None:
        beat_as_ever()
        if "act" in options and Path(options["directory"], options["after"]).exists():
            _act(options["act"], Path(options["directory"]))

    capture.beat = beat
    return options["words"]


def _job(options: dict) -> Any:
    import jax

    from fusejax.data.loader import FusionLoader
    from fusejax.parallel import processes
    from fusejax.parallel.processes import barrier, start_processes
    from fusejax.stages.command import Result
    from fusejax.train import faults
    from fusejax.train.loop import train
    from fusejax.train.optimizer import make_optimizer
    from tests.train.toy import toy_loss, toy_mask, toy_params, toy_records

    faults._PATIENCE, processes._HEARTBEAT_SECONDS = 0.5, 10
    rank = options.get("rank", 0)
    where: dict[str, Any] = {}
    if "port" in options:
        start_processes(coordinator=f"127.0.0.1:{options['port']}", count=2, index=rank, timeout=60)
        where = _on_two()
    acts = {int(step): act for step, act in options.get("acts", {}).items()}
    directory = Path(options["directory"])

    def loss(params: Any, batch: Any, denominator: Any) -> Any:
        _act(acts.get(0), directory)
        return toy_loss(params, batch, denominator)

    def on_step(step: int, values: Any) -> None:
        time.sleep(options.get("pause", 0.0))
        _act(acts.get(step), directory)

    rows = 8
    own: dict[str, Any] = {"rows": range(rank * rows // 2, (rank + 1) * rows // 2)} if where else {}
    params = toy_params()
    if options.get("ballast"):  # a state that takes a while to write
        params["ballast"] = np.random.default_rng(0).normal(size=options["ballast"]).astype(np.float32)
    mask = toy_mask() | ({"ballast": False} if options.get("ballast") else {})
    result = train(
        params,
        FusionLoader(toy_records(40), batch_size=rows, seq_len=12, epochs=4, seed=1, **own),
        loss_fn=loss,
        optimizer=make_optimizer(3e-2, decay_mask=mask),
        total_steps=options.get("steps", 20),
        checkpoint_dir=directory / "checkpoints",
        checkpoint_every=options.get("every", 4),
        keep=options.get("keep"),
        metrics=directory / "metrics.jsonl",
        on_step=on_step,
        faults=faults.FaultPolicy(**options.get("faults", {})),
        **where,
    )
    state = result.state
    if where:  # each process sees its own part only
        state = jax.jit(lambda tree: tree, out_shardings=where["param_shardings"]["embed"]["embedding"])(state)
    if rank == 0:
        final = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}
        np.savez(directory / "final.npz", **final)  # pyright: ignore[reportArgumentType]
    barrier("end", seconds=60)
    return Result({}, "finished")


def _on_two() -> dict[str, Any]:
    import jax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from tests.train.toy import toy_params

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, toy_params())
    shardings["head"]["kernel"] = NamedSharding(mesh, PartitionSpec("data", None))
    return {
        "mesh": mesh,
        "param_shardings": shardings,
        "batch_sharding": NamedSharding(mesh, PartitionSpec("data")),
    }


def _act(what: str | None, directory: Path) -> None:
    if what is None:
        return
    if what == "raise":
        raise RuntimeError("planted for a test")
    if what == "hang":
        time.sleep(600)
    elif what == "busy":  # in C code, where Python's handlers do not run
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        np.linalg.svd(np.random.default_rng(0).normal(size=(4000, 4000)))
    elif what.startswith("saving "):  # a signal as soon as the next save has begun to write
        _let_saves_end(directory)
        threading.Thread(target=_at_next_save, args=(what.split()[1], directory), daemon=True).start()
    elif what == "full":
        _let_saves_end(directory)
        _fill_the_disk()
    else:
        os.kill(os.getpid(), signal.Signals[what])


def _saving(directory: Path) -> bool:
    return any("orbax-checkpoint-tmp" in entry.name for entry in (directory / "checkpoints").iterdir())


def _let_saves_end(directory: Path) -> None:
    deadline = time.monotonic() + 20
    while _saving(directory) and time.monotonic() < deadline:
        time.sleep(0.002)


def _at_next_save(name: str, directory: Path) -> None:
    while not _saving(directory):
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.Signals[name])


def _fill_the_disk() -> None:
    """A limit on the size of files stands for a full disk: both come back from the same write."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # nothing outlives the test
    _serve()
