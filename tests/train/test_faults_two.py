"""Two processes of one training: either is stopped, killed, fails or is stuck."""

import random
import shutil
import time

import numpy as np
import pytest

from fusejax.config import save_config
from fusejax.io.checkpoint import all_steps
from fusejax.stages.run import run_stages
from fusejax.train.metrics import read_metrics
from tests.stages.tiny import make_config

from .test_faults import assert_same_end, assert_steps_restore
from .workers import CANARY, Workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workers():
    with Workers("fusejax.stages.run", "transformers.models.auto.tokenization_auto") as made:
        yield made


@pytest.fixture(scope="module")
def whole(workers, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert codes(workers.pair(directory)) == [0, 0]
    return directory


def codes(jobs):
    return [job.wait() for job in jobs]


def test_two_processes_train_as_one_does(workers, whole, tmp_path):
    assert workers.run(tmp_path / "run")[0] == 0
    losses = [[line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (tmp_path / "run", whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)])
def test_sigterm_to_both_or_one_saves_one_step(workers, whole, tmp_path, ranks):
    of_rank = {rank: {"acts": {"6": "SIGTERM"}} for rank in ranks}
    jobs = workers.pair(tmp_path / "run", of_rank=of_rank, pause=0.1)
    assert codes(jobs) == [85, 85], [job.said() for job in jobs]
    last = all_steps(tmp_path / "run" / "checkpoints")[-1]
    assert 6 <= last < 20 and all(f"step {last} is saved" in job.said() for job in jobs)
    if ranks == (1,):
        assert codes(workers.pair(tmp_path / "run")) == [0, 0]
        assert_same_end(tmp_path / "run", whole)


def test_sigterm_to_one_before_the_first_step_and_during_a_save(workers, whole, tmp_path):
    began = time.monotonic()
    jobs = workers.pair(tmp_path / "run", of_rank={1: {"acts": {"0": "SIGTERM"}}})
    assert codes(jobs) == [85, 85], [job.said() for job in jobs]
    assert time.monotonic() - began < 30
    assert all_steps(tmp_path / "run" / "checkpoints") == []
    jobs = workers.pair(tmp_path / "run", of_rank={0: {"acts": {"6": "saving SIGTERM"}}}, pause=0.1)
    assert codes(jobs) == [85, 85], [job.said() for job in jobs]
    assert codes(workers.pair(tmp_path / "run")) == [0, 0]
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_ends_both_with_its_traceback_last(workers, tmp_path, rank):
    began = time.monotonic()
    jobs = workers.pair(tmp_path / "run", of_rank={rank: {"acts": {"5": "raise"}}})
    assert codes(jobs) == [1, 1], [job.said() for job in jobs]
    assert time.monotonic() - began < 30
    assert jobs[rank].said().rstrip().endswith("RuntimeError: planted for a test")
    assert f"process {rank} has failed (RuntimeError)" in jobs[1 - rank].said()
    logs = [job.log.stat().st_mtime_ns for job in jobs]
    assert logs[rank] > logs[1 - rank]


def test_a_stuck_process_is_told_by_rank(workers, tmp_path):
    jobs = workers.pair(tmp_path / "run", of_rank={1: {"acts": {"5": "hang"}}}, faults={"watchdog_seconds": 4.0})
    assert codes(jobs) == [75, 75], [job.said() for job in jobs]
    assert "_act" in jobs[1].said() and "_act" not in jobs[0].said()
    assert "process 1 of 2 is stepping after step" in jobs[1].said() or "process 0 has failed" in jobs[1].said()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A configuration with its corpus; one source of 6 shards."""
    place = tmp_path_factory.mktemp("stages")
    changes = {"capture": {"top_k": 4, "context": 32, "batch_tokens": 256, "shard_size": 8}, "merge": None}
    config = make_config(place, sources=[str(place / "a")], fusions=[{"name": "fused"}], **changes)
    run_stages(config, ("prepare",))
    save_config(config, place / "config.yaml")
    return place


@pytest.mark.parametrize(("act", "code"), [("raise", 1), ("hang", 75)])
def test_a_process_that_fails_or_is_stuck_in_capture_ends_both(workers, prepared, tmp_path, act, code):
    """It is at its second shard; the other makes its own and waits."""
    run = tmp_path / "run"
    shutil.copytree(prepared / "run" / "corpus", run / "corpus")
    words = ["capture", str(prepared / "config.yaml"), "--output", str(run)]
    words += ["--faults.watchdog-seconds", "4"] if act == "hang" else []
    jobs = workers.pair(run, words=words, of_rank={1: {"act": act, "after": "captured/a/records-00001.array_record"}})
    assert codes(jobs) == [code, code], [job.said() for job in jobs]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()
    ]  # logs, too
    made = {path.name: path.stat().st_mtime for path in run.glob("captured/a/*.array_record")}
    if act == "hang":
        assert "process 1 of 2 is in capture and has not got on for 12 s" in jobs[1].said()
        assert "_act" in jobs[1].said() and "in barrier" in jobs[0].said()  # the stacks of both
    else:
        assert jobs[1].said().rstrip().endswith("RuntimeError: planted for a test")
        assert "process 1 has failed (RuntimeError)" in jobs[0].said()
        assert time.time() - max(made.values()) < 30
    assert {f"records-0000{shard}.array_record" for shard in ((0, 1, 2, 4) if act == "hang" else (1,))} <= set(made)


def test_a_kill_of_either_at_any_time_ends_the_other_and_loses_no_step(workers, whole, tmp_path):
    """Who is killed and when is left to chance; the other loses the coordinator, a collective or its heartbeat."""
    seed = time.time_ns() % 10**6
    chance = random.Random(seed)
    rank, step, act = chance.randrange(2), chance.randrange(3, 16), chance.choice(["SIGKILL", "saving SIGKILL"])
    told = f"seed {seed}: process {rank}, {act} after step {step}"
    jobs = workers.pair(tmp_path / "run", of_rank={rank: {"acts": {str(step): act}}}, pause=0.05)
    assert jobs[rank].wait() == -9, told
    began = time.monotonic()
    assert jobs[1 - rank].wait() not in (0, -999), f"{told}: {jobs[1 - rank].said()}"  # -999: it did not end by itself
    assert time.monotonic() - began < 40, told
    assert_steps_restore(tmp_path / "run", whole)
    jobs = workers.pair(tmp_path / "run")
    assert codes(jobs) == [0, 0], [told, *(job.said() for job in jobs)]
    assert_same_end(tmp_path / "run", whole)
    assert_steps_restore(tmp_path / "run", whole)
