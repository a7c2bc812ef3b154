"""The local launcher, with small programs in place of fusejax."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fusejax.cli import main
from fusejax.stages.launch import launch_local
from tests.paths import ROOT

LAUNCH = """
    import sys
    from fusejax.stages.launch import launch_local
    sys.exit(launch_local([sys.executable, "-c", sys.argv[1]], procs=2, grace=float(sys.argv[2])))
"""
RANK = "import os, sys, time, signal; rank = int(os.environ['FUSEJAX_PROCESS'])\n"


def program(text: str) -> list[str]:
    return [sys.executable, "-c", RANK + textwrap.dedent(text)]


def test_each_process_is_told_who_it_is_and_labelled(capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/nowhere")
    ours = ("COORDINATOR", "PROCESSES", "LOCAL_DEVICES")
    names = [*(f"FUSEJAX_{name}" for name in ours), "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"]
    code = launch_local(
        program(f"import json; print(json.dumps([os.environ[n] for n in {names}]))"), procs=2, devices=4
    )
    out, err = capfd.readouterr()
    assert code == 0
    address, *rest = json.loads(out)  # of process 0 alone, as it wrote it
    assert address.startswith("127.0.0.1:")
    assert rest == ["2", "0,1,2,3", "4", "--xla_dump_to=/nowhere"]
    label, line = err.strip().split(" ", 1)
    assert (label, json.loads(line)) == ("[1]", [address, "2", "4,5,6,7", "4", "--xla_dump_to=/nowhere"])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_others(failing, capfd):
    start = time.monotonic()
    text = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == {failing}:
            sys.exit(17)
        time.sleep(60)
    """
    assert launch_local(program(text), procs=2, grace=0.5) == 17
    assert time.monotonic() - start < 20
    assert f"process {failing} was the first to end, with exit code 17" in capfd.readouterr().err


@pytest.mark.parametrize("code", [2, 75, 85])
def test_codes_that_a_scheduler_reads_are_kept(code):
    # the other process saves for longer than the grace after a failure, which is not one
    text = f"time.sleep(rank * (1.0 if {code} == 85 else 0.0)); sys.exit({code})"
    assert launch_local(program(text), procs=2, grace=0.2) == code


def test_a_process_ended_by_a_signal_gives_a_shells_code():
    text = "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)"
    assert launch_local(program(text), procs=2, grace=0.2) == 137


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_signals_reach_every_process(number, code):
    text = f"""
        signal.signal({int(number)}, lambda *_: sys.exit({code}))
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
    """
    with started(RANK + textwrap.dedent(text)) as launcher:
        wait_for(launcher, "ready", times=2)
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == code


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends them")
def test_processes_do_not_outlive_a_killed_launcher():
    with started(RANK + "print('pid', os.getpid(), file=sys.stderr, flush=True); time.sleep(60)") as launcher:
        pids = [int(line.split()[-1]) for line in wait_for(launcher, "pid", times=2)]
        launcher.kill()
        deadline = time.monotonic() + 10
        while alive := [pid for pid in pids if _runs(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)


def test_the_command_line_hands_on_what_is_not_its_own(monkeypatch):
    seen = {}

    def launched(arguments, **options):
        seen.update(options, arguments=list(arguments[3:]))
        return 85

    monkeypatch.setattr("fusejax.stages.launch.launch_local", launched)
    words = ["launch", "local", "--procs", "2", "--devices=4", "run", "c.yaml", "--stages", "train", "--json"]
    assert main(words) == 85
    assert seen == {
        "procs": 2,
        "devices": 4,
        "grace": 10.0,
        "arguments": ["run", "c.yaml", "--stages", "train", "--json"],
    }
    assert main(["launch", "local", "--procs", "3", "--", "env", "--json"]) == 85
    assert (seen["procs"], seen["arguments"]) == (3, ["env", "--json"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "local", "--procs", "2"], "launch needs the command"),
        (["launch", "local", "--procs", "0", "run"], "--procs"),
        (["launch", "elsewhere", "--procs", "2", "run"], "elsewhere"),
        (["launch", "local", "run", "c.yaml"], "--procs"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_further_processes_leave_to_the_first_what_is_not_shared(monkeypatch, capsys):
    monkeypatch.setenv("FUSEJAX_PROCESS", "1")
    assert main(["evaluate", "--model", "nowhere", "--data", "nowhere"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FUSEJAX_PROCESS", "0")
    assert main(["evaluate", "--model", "nowhere", "--data", "nowhere"]) == 2


def started(text: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCH), text, "10"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def wait_for(launcher: subprocess.Popen, word: str, *, times: int) -> list[str]:
    """The first `times` lines with a word on the launcher's standard error."""
    found: list[str] = []
    while len(found) < times:
        line = launcher.stderr.readline()
        assert line, "the launcher has ended"
        found += [line.strip()] if word in line else []
    return found


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
