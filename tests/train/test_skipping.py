"""Bad steps: left out up to a number, then told with their documents; the trajectory is otherwise untouched."""

import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.checkpoint import all_steps
from fusejax.train.faults import FaultPolicy
from fusejax.train.metrics import read_metrics
from fusejax.train.skipping import SkipPolicy

from .test_loop import loader, losses, run, same
from .toy import toy_loss, toy_records


def marked(*numbers):
    docs = toy_records(40)
    for number in numbers:
        docs[number].arrays["labels"][:] = 99
    return docs


def poison(factor):
    def loss_fn(params, batch, denominator):
        loss, metrics = toy_loss(params, batch, denominator)
        return loss * jnp.where(jnp.any(batch.labels == 99), factor, 1.0), metrics

    return loss_fn


@pytest.mark.parametrize("factor", [np.nan, 50.0])
def test_bad_steps_are_left_out_and_the_run_goes_on(tmp_path, capsys, factor):
    docs = marked(17)
    data = loader(docs)
    bad = [n + 1 for n in range(20) if "doc17" in data.documents(n)]
    if factor == 50:
        bad = [step for step in bad if step > 17]  # the median is known from here on
    faults = FaultPolicy(max_skipped_steps=2, spike_factor=4.0)
    options = {"docs": docs, "loss_fn": poison(factor), "faults": faults, "metrics": tmp_path / "m.jsonl"}
    result = run(20, checkpoint_dir=tmp_path, checkpoint_every=7, keep=None, **options)
    skipped = [line["step"] for line in read_metrics(tmp_path / "m.jsonl") if line.get("skipped")]
    assert bad and skipped == bad and int(result.state.step) == 20 - len(bad)
    assert all(np.isfinite(leaf).all() for leaf in result.state.params["head"].values())
    told = capsys.readouterr().err
    assert all(f"step {step} has loss" in told for step in bad) and "doc17" in told
    # Resumed between two of them it takes the same decisions.
    for step in reversed(all_steps(tmp_path)[:-1]):
        again = run(20, checkpoint_dir=tmp_path, keep=None, resume_step=step, **options)
        same(again.state, result.state)


def test_too_many_in_a_row_stop_the_run_with_the_last_good_state_saved(tmp_path):
    docs = marked(*range(40))
    faults = FaultPolicy(max_skipped_steps=2)
    options = {"docs": docs, "checkpoint_dir": tmp_path, "checkpoint_every": 1, "keep": None}
    with pytest.raises(FloatingPointError, match=r"(?s)step 3 .*doc.*3 in a row is more than .*max_skipped_steps = 2"):
        run(20, loss_fn=poison(np.nan), faults=faults, **options)
    # What was saved meanwhile is the untouched beginning, so that the run can go on with mended data.
    rest = run(20, docs=docs, checkpoint_dir=tmp_path)
    assert rest.start_step == 2 and int(rest.state.step) == 18


def test_a_threshold_that_nothing_exceeds_changes_no_bit():
    plain, watched = run(20), run(20, faults=FaultPolicy(spike_factor=1e6))
    assert losses(plain) == losses(watched)
    same(plain.state, watched.state)


def test_the_threshold_is_the_median_of_what_is_known_two_steps_later():
    policy = SkipPolicy(max_skipped=1, spike_factor=2.0)
    for step in range(1, 41):
        policy.judge(step, float(step), 1.0, skipped=False, documents=list)
    assert policy.limit(17) == np.inf  # 15 known: steps 7 to 15 of the window
    assert policy.limit(41) == 2.0 * np.median(np.arange(8, 40))
    other = SkipPolicy(max_skipped=1, spike_factor=2.0)
    other.set_state(policy.get_state())
    assert other.limit(41) == policy.limit(41)
    assert SkipPolicy().limit(100) is None
    for wrong in ({"max_skipped": -1}, {"spike_factor": 1.0}):
        with pytest.raises(InputError):
            SkipPolicy(**wrong)
