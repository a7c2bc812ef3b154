"""A run by two processes is the run of one, also after a kill or a preemption.

Stores are the same to the bit, parameters too where both have one device: a sum of two has one order. With four devices
each, sums over the eight are formed in another order than those over two, and parameters agree to rounding.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from fusejax.io.checkpoint import load_model_params
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.parallel import flatten_paths
from tests.paths import ROOT
from tests.stages.tiny import make_config

pytestmark = pytest.mark.slow

STORES = ("captured/a", "captured/target", "aligned/a", "aligned/target", "fused/mixed")
TWO = ("launch", "local", "--procs", "2")
EIGHT = (*TWO, "--devices", "4")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # of float32, over 40 steps
FIRST = "prepare,capture,align,fuse"


def start(place: Path, *words: str, launch: tuple[str, ...] = (), devices: int = 2) -> subprocess.Popen:
    """Starts `fusejax run` on the configuration of a place, in processes of their own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "fusejax", *launch, "run", str(place / "config.yaml"), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def run(place: Path, *words: str, **options) -> tuple[str, str]:
    return finish(start(place, *words, **options))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The models and the text, and a configuration without an output."""
    root = tmp_path_factory.mktemp("given")
    train = {"batch_size": 8, "seq_len": 32, "learning_rate": 1e-2, "max_steps": 40, "epochs": 20, "log_every": 1}
    config = make_config(
        root,
        sources=[str(root / "a")],
        capture={"top_k": 4, "context": 32, "batch_tokens": 256, "shard_size": 4},
        fusions=[{"name": "mixed", "method": "avg_ce", "include_target": True}],
        train=train | {"baseline": False, "checkpoint_every": 5, "evaluate_every": 20},
        mesh={"data": 1, "fsdp": 2, "tensor": 1},
        merge=None,
    )
    return config.model_dump(mode="json")


@pytest.fixture
def place(given, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given | {"output": str(tmp_path / "run")}))
    return tmp_path


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """The run of one process with two devices."""
    place = tmp_path_factory.mktemp("alone")
    (place / "config.yaml").write_text(yaml.safe_dump(given | {"output": str(place / "run")}))
    run(place, "--stages", f"{FIRST},train,export")
    return place / "run"


def assert_same_stores(ours: Path, theirs: Path) -> None:
    for store in STORES:
        names = sorted(path.name for path in (theirs / store).iterdir())
        assert sorted(path.name for path in (ours / store).iterdir()) == names
        for name in set(names) - {MANIFEST}:
            assert (ours / store / name).read_bytes() == (theirs / store / name).read_bytes(), f"{store}/{name}"
        found, expected = (read_manifest(directory / store) for directory in (ours, theirs))
        assert (found.fingerprint, found.files) == (expected.fingerprint, expected.files)
        for key in set(expected.facts) - {"seconds", "mass_kept"}:
            assert found.facts[key] == expected.facts[key], f"{store}: {key}"
        if "mass_kept" in expected.facts:  # a sum of floats, in another order
            assert found.facts["mass_kept"] == pytest.approx(expected.facts["mass_kept"], rel=1e-12)


def assert_same_training(ours: Path, theirs: Path, **tolerance: float) -> None:
    params, expected = (flatten_paths(load_model_params(run / "models" / "mixed")) for run in (ours, theirs))
    for name, leaf in expected.items():
        np.testing.assert_allclose(params[name], leaf, **(tolerance or {"rtol": 0}), err_msg=name)
    lines, told = (_metrics(run / "train" / "mixed" / "metrics.jsonl") for run in (ours, theirs))
    assert [line == pytest.approx(row, rel=1e-3) for line, row in zip(lines, told, strict=True)] == [True] * len(told)
    assert tolerance or lines == told


def _metrics(path: Path) -> list[dict[str, float]]:
    timed = {"seconds", "tokens_per_second", "peak_share"}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_two_processes_give_what_one_gives_also_after_a_kill(alone, place):
    killed = start(place, "--stages", FIRST, launch=EIGHT)
    store = place / "run" / "captured"
    deadline = time.monotonic() + 300
    while not list((store / "target").glob("*.array_record")):  # all of a, and a part of the target's
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()  # and with it, on Linux, both processes
    killed.communicate()
    assert (store / "a" / MANIFEST).exists()
    assert not (store / "target" / MANIFEST).exists()
    run(place, "--stages", "capture")
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "4")
    out, err = run(place, "--stages", "align,fuse,train,export", "--json", *mesh, launch=EIGHT)
    result = json.loads(out.splitlines()[-1])  # of process 0 alone
    assert set(result["stage_seconds"]) == {"align", "fuse", "train", "export"}
    assert "[0] align: done" in err
    assert "[1] align: done" not in err
    assert_same_stores(place / "run", alone)
    assert_same_training(place / "run", alone, **ROUNDING)
    exported = [file for file in sorted((alone / "export").iterdir()) if file.suffix == ".safetensors"]
    assert exported
    for file in exported:
        ours, theirs = load_file(place / "run" / "export" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            np.testing.assert_allclose(ours[name], weight, **ROUNDING, err_msg=name)


def test_a_training_that_two_were_stopped_in_is_finished_by_one(alone, place):
    (place / "run").mkdir()
    for part in ("corpus", "captured", "aligned", "fused"):
        shutil.copytree(alone / part, place / "run" / part)
    stopped = start(place, "--stages", "train", launch=TWO)
    metrics = place / "run" / "train" / "mixed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.stat().st_size):
        assert stopped.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    finish(stopped, code=85)
    steps = [int(path.name) for path in (metrics.parent / "checkpoints").iterdir() if path.name.isdigit()]
    assert 0 < max(steps) < 40
    run(place, "--stages", "train")
    assert_same_training(place / "run", alone)


def test_a_mistake_ends_all_processes_at_once(place):
    begin = time.monotonic()
    _, err = finish(start(place, "--mesh.fsdp", "1", "--stages", "train", launch=TWO), code=2)
    assert "`mesh` has 1 devices, the 2 processes have 2" in err
    assert "Traceback" not in err
    assert time.monotonic() - begin < 60
