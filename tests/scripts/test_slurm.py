"""scripts/slurm.sbatch under a real SLURM: taken as it is, preempted, requeued, finished as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fusejax.cli import main
from tests.paths import ROOT
from tests.stages.tiny import make_config

HELPER = ROOT / "scripts" / "dev" / "one_machine_slurm.sh"
STEPS = 240  # long enough to be interrupted: the controller takes a second or two to preempt


def _sh(script, *, seconds=60, check=True, **environment):
    return subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=check,
    )


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The shell line that makes SLURM's programs answer."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here: SLURM is taken from Debian's packages")
    place = tmp_path_factory.mktemp("slurm")
    try:
        started = _sh(f"bash {HELPER} start {place}", seconds=120, check=False)
        if started.returncode:
            pytest.skip(f"SLURM cannot be had: {started.stderr[-300:]}")
        yield f". {place}/env.sh"
    finally:
        if (place / "env.sh").exists():
            _sh(f". {place}/env.sh; scancel --user=$(id -un); bash {HELPER} stop {place}", check=False)


@pytest.fixture
def place(tmp_path):
    """A directory with a `fusejax` to call."""
    program = tmp_path / "bin" / "fusejax"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m fusejax "$@"\n')
    program.chmod(0o755)
    return tmp_path


def _prepare(root):
    """Two equal runs, `run` and `alone`, that are ready to be trained."""
    config = make_config(root).model_dump(mode="json", exclude_unset=True)
    del config["merge"]
    config["sources"], config["fusions"] = config["sources"][:1], config["fusions"][:1]
    config["train"] |= {"baseline": False, "max_steps": STEPS, "epochs": 1 + STEPS // 8}
    for name in ("run", "alone"):
        config["output"] = str(root / name)
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(root / "run.yaml"), "--stages", "prepare,capture,align,fuse"]) == 0
    shutil.copytree(root / "run", root / "alone")


def _environment(place: Path) -> dict[str, str]:
    return {"FUSEJAX_VENV": str(place), "FUSEJAX_ROOT": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def _losses(path: Path) -> dict[int, float]:
    lines = (path / "train" / "fused" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _wait(condition, seconds, log):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.3)


@pytest.mark.slow
def test_options_are_taken_and_wrong_ones_are_not(slurm):
    good = _sh(f"{slurm}; sbatch --test-only scripts/slurm.sbatch train x.yaml", check=False)
    assert good.returncode == 0 and "to start at" in good.stderr, good.stderr
    bad = _sh(f"{slurm}; sbatch --test-only --gpus-per-node=9 scripts/slurm.sbatch train x.yaml", check=False)
    assert bad.returncode != 0


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_ends_with_the_same_loss(slurm, place):
    _prepare(place)
    log, bad, settings = place / "job.log", place / "bad.log", _environment(place)
    job = "sbatch --ntasks-per-node=2"
    submitted = _sh(
        f"{slurm}; {job} --parsable --output={log} scripts/slurm.sbatch train {place}/run.yaml --mesh.data 2",
        **settings,
    )
    number = submitted.stdout.strip()
    # Its first line of progress, which need not be that of the first step.
    _wait(lambda: log.exists() and any(word in log.read_text() for word in (" step=", "== ended")), 400, log)
    assert "== ended" not in log.read_text(), log.read_text()
    alone = f"JAX_NUM_CPU_DEVICES=2 {place}/bin/fusejax train {place}/alone.yaml --mesh.data 2"
    undisturbed = subprocess.Popen(["bash", "-euc", alone], cwd=ROOT, env={**os.environ, **settings})
    # The job that preempts has a mistake in its configuration: it ends with 2 and is not started again.
    urgent = f"{job} --wait --partition=urgent --output={bad} scripts/slurm.sbatch train {place}/none.yaml"
    done = _sh(f"{slurm}; {urgent}", seconds=300, check=False, **settings)
    assert done.returncode == 2, bad.read_text()
    assert "requeued" not in bad.read_text()
    assert undisturbed.wait(timeout=300) == 0
    _wait(lambda: not _sh(f"{slurm}; squeue -h").stdout.strip(), 400, log)

    said = log.read_text()
    assert "== ended with 85\n== requeued" in said, said
    assert f"== job {number}, start 1:" in said
    assert said.rstrip().endswith("== ended with 0"), said
    interrupted, expected = _losses(place / "run"), _losses(place / "alone")
    assert sorted(interrupted) == sorted(expected) and max(expected) == STEPS
    assert interrupted[STEPS] == pytest.approx(expected[STEPS], rel=1e-5)
