"""`fusejax <command>`: parses, calls one stage, prints. No work is done here.

Exit codes: 0 done; 2 bad configuration or input; 85 stopped by SIGTERM and 130 by SIGINT, with what was done kept; 75
stuck (the watchdog); 1 anything else. With `--json` the last line of standard
output is one JSON object. Progress and messages go to standard error.
"""

__all__ = ["main"]

import contextlib
import errno
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fusejax.errors import PREEMPTED, WATCHDOG, InputError, Preempted, Stuck, nearest


class _Command(NamedTuple):
    module: str  # holds `command(arguments: list[str]) -> result`
    summary: str


COMMANDS = {
    "quickstart": _Command("quickstart", "The whole of FuseLLM on this machine's own text (CPU, no network)."),
    "run": _Command("run", "All stages of a configuration, or those named by --stages."),
    "pretrain": _Command("run", "Train the models that a configuration says how to make."),
    "prepare": _Command("run", "Read, cut, de-duplicate and split the text."),
    "capture": _Command("run", "Run the sources over the text and store their top-k distributions."),
    "align": _Command("align", "Carry distributions to the target's tokenizer; or compare two tokenizers."),
    "fuse": _Command("run", "Choose or mix the sources' distributions per window of text."),
    "train": _Command("run", "Train the target on clm_weight * CLM + fusion_weight * KL(fused || target)."),
    "merge": _Command("merge", "Merge targets in parameter space."),
    "export": _Command("convert", "Write a model as a Hugging Face directory."),
    "import": _Command("convert", "Write a Hugging Face directory as a fusejax checkpoint."),
    "evaluate": _Command("evaluate", "Bits per byte of a model on text, or of all models of a run."),
    "chat": _Command("chat", "Talk to a model in the terminal."),
    "answer": _Command("answer", "Answer a file of questions, for a judge or a test to read."),
    "plan": _Command("plan", "Memory, speed, traffic and disk of a run, without weights or accelerators."),
    "inspect": _Command("inspect", "Show what an artefact or a model directory holds."),
    "report": _Command("report", "Write report.html and plots of a run, finished or not."),
    "experiments": _Command("experiments", "Run the arms of an experiment with several seeds, and compare them."),
    "verify": _Command("verify", "Check every checksum under a directory."),
    "launch": _Command("launch", "Start several processes of a command on this machine."),
    "env": _Command("env", "Versions, devices and memory, for a bug report."),
    "schema": _Command("run", "Print the JSON schema of configurations, for editors."),
}

# With a configuration several processes can share these; of the others process 0 does all.
_SHARED = ("run", "pretrain", "prepare", "capture", "align", "fuse", "train", "merge", "export", "evaluate")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "usage: fusejax COMMAND [options]\n\n" + "\n".join(lines) + "\n\n`fusejax COMMAND --help` lists options."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "false")  # it would take SIGTERM from `fusejax.train.faults`
    _make_room_for_faked_devices()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from fusejax import __version__

        print(__version__)
        return 0
    name, *rest = words
    if name == "experiments":  # many trainings of one shape
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "fusejax", "xla"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}.{nearest(name, COMMANDS)}\n\n{_usage()}", 2)
    code, error = 1, None
    try:
        code = _guarded(lambda: _run(name, rest))
    except Exception as raised:
        if not _several():
            raise
        code, error = (WATCHDOG if isinstance(raised, Stuck) else 1), raised
    if (code == PREEMPTED and name != "launch") or (code and _several()):
        from fusejax.train.faults import leave

        # At once: its peers may be waiting for it, and threads in C++ that were interrupted do not outlive Python.
        leave(code, error=error)
    return code


def _make_room_for_faked_devices() -> None:
    """Gives XLA more threads than a small machine has cores, where one CPU stands for several devices.

    Devices of one process wait for each other in threads of one pool, as large as the machine or the number of
    devices; with two of both, whatever else waits there made a collective time out.
    """
    told = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = int(told) if told.isdecimal() else int(flag[1]) if flag else 1
    if count > 1:
        os.environ.setdefault("NPROC", str(2 * count + (os.cpu_count() or 1)))  # XLA's own name for the pool's size


def _run(name: str, rest: list[str]) -> None:
    as_json = "--json" in rest and name != "launch"  # which hands it on to what it starts
    rest = [word for word in rest if word != "--json" or not as_json]
    if _left_to_the_first(name, rest):
        return
    module = importlib.import_module(f"fusejax.stages.{COMMANDS[name].module}")
    with _watched(name):
        result = module.command(name, rest)
    if as_json:
        print(json.dumps(result.data, ensure_ascii=False, default=float))
    elif result.text:
        print(result.text)
    if result.exit_code:
        raise SystemExit(result.exit_code)


def _watched(name: str) -> contextlib.AbstractContextManager[Any]:
    """Signals end what takes long in an orderly way; see `fusejax.train.faults`."""
    if name not in (*_SHARED, "quickstart", "experiments"):
        return contextlib.nullcontext()
    from fusejax.train.faults import guarded

    return guarded()


def _left_to_the_first(name: str, rest: list[str]) -> bool:
    """Whether this is a further process of a job, and the command no configuration that processes share."""
    further = name != "env" and os.environ.get("FUSEJAX_PROCESS", "0") not in ("", "0")  # each needs its own flags
    return further and not (name in _SHARED and rest and not rest[0].startswith("-"))


def _several() -> bool:
    """Whether this is one of several processes."""
    if "jax" not in sys.modules:
        return False
    from fusejax.parallel.processes import process_count

    return process_count() > 1


def _guarded(call: Callable[[], Any]) -> int:
    """Turns exceptions into messages and exit codes."""
    from pydantic import ValidationError

    try:
        call()
    except InputError as error:
        return _fail(str(error), 2)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        return _fail("not a valid configuration:\n  " + "\n  ".join(problems), 2)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # who reads our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"the disk is full ({error.filename or error.strerror}); free space and run it again", 1)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _fail(f"no permission: {error.filename or error}; choose another directory", 2)
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG) and error.filename:
            return _fail(f"{error.filename}: {os.strerror(error.errno).lower()}; choose another path", 2)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    except Preempted as error:
        print(f"fusejax: {error.message}", file=sys.stderr)
        return int(error.code or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    return 0


def _fail(text: str, code: int) -> int:
    print(f"fusejax: error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
