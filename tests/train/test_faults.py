"""Trainings that are stopped, killed, stuck or without disk, each in a process of its own."""

import random
import signal
import time

import numpy as np
import pytest

from fusejax.io.checkpoint import all_steps, restore_train_state
from fusejax.train.metrics import read_metrics
from fusejax.train.optimizer import make_optimizer
from fusejax.train.step import init_train_state

from .toy import toy_mask, toy_params
from .workers import Workers


@pytest.fixture(scope="module")
def workers():
    with Workers() as made:
        yield made


@pytest.fixture(scope="module")
def whole(workers, tmp_path_factory):
    """An undisturbed run that keeps every fourth step."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert workers.run(directory) == (0, "finished\n")
    return directory


def assert_same_end(directory, whole):
    with np.load(directory / "final.npz") as found, np.load(whole / "final.npz") as expected:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])
    losses = [[line["loss"] for line in read_metrics(path / "metrics.jsonl")] for path in (directory, whole)]
    assert losses[0] == losses[1]


def assert_steps_restore(directory, whole):
    """Every listed step verifies; those that the undisturbed run has, too, are the same numbers."""
    abstract = init_train_state(toy_params(), make_optimizer(3e-2, decay_mask=toy_mask()))
    for step in all_steps(directory / "checkpoints"):
        found, _ = restore_train_state(directory / "checkpoints", abstract, step=step)
        if step in all_steps(whole / "checkpoints"):
            expected, _ = restore_train_state(whole / "checkpoints", abstract, step=step)
            for a, b in zip(_leaves(found), _leaves(expected), strict=True):
                np.testing.assert_array_equal(a, b)


def _leaves(state):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_sigterm_saves_the_step_and_the_rerun_ends_as_if_nothing_was(workers, whole, tmp_path):
    code, said = workers.run(tmp_path / "run", acts={"6": "SIGTERM"})
    assert code == 85
    assert "stopped by SIGTERM: step 7 is saved; the same command goes on from here" in said
    assert all_steps(tmp_path / "run" / "checkpoints") == [4, 7]
    assert workers.run(tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", whole)


def test_interrupts_save_too(workers, tmp_path):
    code, said = workers.run(tmp_path / "run", acts={"6": "SIGINT"})
    assert (code, all_steps(tmp_path / "run" / "checkpoints")) == (130, [4, 7])
    assert "stopped by SIGINT" in said


@pytest.mark.parametrize("act", ["SIGTERM", "busy"])
def test_sigterm_before_the_first_step(workers, tmp_path, act):
    began = time.monotonic()
    code, said = workers.run(tmp_path / "run", acts={"0": act})
    assert code == 85 and "stopped by SIGTERM" in said
    assert all_steps(tmp_path / "run" / "checkpoints") == []
    assert time.monotonic() - began < 20


def test_sigterm_during_a_save(workers, whole, tmp_path):
    code, said = workers.run(tmp_path / "run", acts={"6": "saving SIGTERM"}, pause=0.02)
    assert code == 85, said
    steps = all_steps(tmp_path / "run" / "checkpoints")
    assert steps[:2] == [4, 8] and len(steps) <= 3
    assert workers.run(tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", whole)


def test_kills_at_random_points_lose_no_step_and_spoil_none(workers, whole, tmp_path):
    chance, orphans = random.Random(7), 0
    for act in ({"3": "saving SIGKILL"}, {"11": "saving SIGKILL"}, {str(chance.randrange(13, 20)): "SIGKILL"}):
        assert workers.run(tmp_path / "run", acts=act, pause=0.01)[0] == -9
        assert_steps_restore(tmp_path / "run", whole)
        orphans += any("tmp" in entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())
    job = workers.start(tmp_path / "run", pause=0.1)  # by the clock, too
    time.sleep(chance.uniform(0.3, 1.2))
    job.kill(signal.SIGKILL)
    assert job.wait() == -9
    assert_steps_restore(tmp_path / "run", whole)
    code, _ = workers.run(tmp_path / "run")
    assert orphans and code == 0 and not [e for e in (tmp_path / "run" / "checkpoints").iterdir() if "tmp" in e.name]
    assert_same_end(tmp_path / "run", whole)


def test_a_stuck_step_is_told_with_its_stacks(workers, tmp_path):
    code, said = workers.run(tmp_path / "run", acts={"5": "hang"}, faults={"watchdog_seconds": 3.0})
    assert code == 75
    assert "process 0 of 1 is stepping after step 5 and has not got on for 3 s: stuck" in said
    assert "_act" in said and "Thread" in said


def test_a_full_disk_is_told_and_what_was_saved_stays(workers, whole, tmp_path):
    # Incompressible weights make files above the limit.
    code, said = workers.run(tmp_path / "run", acts={"6": "full"}, ballast=20_000)
    assert code == 1
    assert "the disk is full (cannot write" in said
    assert "fusejax: error" in said.splitlines()[-1]
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    code, said = workers.run(tmp_path / "run", ballast=20_000)
    assert (code, said) == (0, "finished\n")
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 21))
