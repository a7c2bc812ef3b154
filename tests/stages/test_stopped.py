"""The command line stopped in the middle of a stage, and what it leaves: work that counts, and no secret."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fusejax.config import save_config
from tests.paths import ROOT
from tests.stages.tiny import make_config

CANARY = "canary-1f3b8e77"
STAGES = "prepare,capture,align,fuse,train"
REST = ",export,evaluate,report"

pytestmark = pytest.mark.slow


def command(config, stages=STAGES):
    secrets = dict.fromkeys(("FUSEJAX_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY"), CANARY)
    secrets["HTTPS_PROXY"] = f"http://user:{CANARY}@127.0.0.1:9"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | secrets
    words = [sys.executable, "-m", "fusejax", "run", str(config), "--stages", stages]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)


def test_sigterm_ends_capture_and_training_and_the_same_command_goes_on(tmp_path):
    config = make_config(tmp_path, merge=None, fusions=[{"name": "fused", "window_bytes": 32}])
    changes = {"epochs": 30, "max_steps": 200, "checkpoint_every": 4, "baseline": False}
    changes = {"train": config.train.model_copy(update=changes), "sources": config.sources[:1]}
    save_config(config.model_copy(update=changes), tmp_path / "config.yaml")
    run, said = tmp_path / "run", []
    for sign in ("captured/a/*.array_record", "train/fused/checkpoints/4"):
        process = command(tmp_path / "config.yaml")
        deadline = time.monotonic() + 120
        while not list(run.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        said.append(process.communicate(timeout=60)[0])
        assert process.returncode == 85, said[-1]
        assert "stopped by SIGTERM" in said[-1] and "the same command goes on from here" in said[-1]
    assert not (run / "models" / "fused").exists()
    process = command(tmp_path / "config.yaml", STAGES + REST)
    said.append(process.communicate(timeout=240)[0])
    assert process.returncode == 0, said[-1]
    assert (run / "report.html").is_file() and (run / "models" / "fused").is_dir()
    assert CANARY not in "".join(said)
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert not holding
