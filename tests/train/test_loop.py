import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.checkpoint import all_steps
from fusejax.train.faults import FaultPolicy
from fusejax.train.loop import state_shardings, train
from fusejax.train.metrics import read_metrics
from fusejax.train.optimizer import make_optimizer, make_schedule
from fusejax.train.step import init_train_state

from .toy import toy_loss, toy_mask, toy_params, toy_records

SCHEDULE = make_schedule("cosine", peak=3e-2, total_steps=20, warmup_steps=3)


def loader(docs=None, **options):
    return FusionLoader(
        toy_records(40) if docs is None else docs, batch_size=8, seq_len=12, epochs=4, seed=1, **options
    )


def optimizer():
    return make_optimizer(SCHEDULE, decay_mask=toy_mask())


def run(steps=20, *, docs=None, loss_fn=toy_loss, **options):
    return train(toy_params(), loader(docs), loss_fn=loss_fn, optimizer=optimizer(), total_steps=steps, **options)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def losses(result):
    return [h["loss"] for h in result.history]


def on_mesh(kind=AxisType.Auto, shape=(2, 4)):
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(kind,) * 2, devices=devices)
    specs = jax.tree.map(lambda _: P(), toy_params())
    if kind is AxisType.Auto:
        specs["head"]["kernel"] = P("fsdp", None)
    return {
        "mesh": mesh,
        "param_shardings": jax.tree.map(lambda s: NamedSharding(mesh, s), specs),
        "batch_sharding": NamedSharding(mesh, P(("data", "fsdp"))),
    }


@pytest.fixture(scope="module")
def whole():
    return run()


def test_it_learns_and_reports(whole, tmp_path):
    assert int(whole.state.step) == 20 and whole.start_step == 0
    assert [h["step"] for h in whole.history] == list(range(1, 21))
    assert losses(whole)[-1] < losses(whole)[0]
    assert all(0 < h["trained_share"] < 1 and h["tokens_per_second"] > 0 for h in whole.history)
    assert whole.peak_bytes > 0 and whole.compile_seconds > 0


@pytest.mark.parametrize("where", ["one", "mesh"])
def test_twenty_steps_are_ten_and_ten_bit_for_bit(whole, tmp_path, where):
    options = on_mesh() if where == "mesh" else {}
    whole = run(**options) if options else whole
    first = run(10, checkpoint_dir=tmp_path, metrics=tmp_path / "m.jsonl", **options)
    assert all_steps(tmp_path) == [10]
    second = run(20, checkpoint_dir=tmp_path, metrics=tmp_path / "m.jsonl", **options)
    assert second.start_step == 10
    same(second.state, whole.state)
    assert losses(first) + losses(second) == losses(whole)
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [r["step"] for r in lines] == list(range(1, 21))
    assert [r["loss"] for r in lines] == losses(whole)
    finished = run(20, checkpoint_dir=tmp_path, metrics=tmp_path / "m.jsonl", **options)
    assert finished.history == []
    same(finished.state, whole.state)


class Killed(Exception):
    pass


def test_a_run_killed_between_checkpoints_repeats_the_steps_after_the_last(whole, tmp_path):
    def die(step, values):
        if step == 13:
            raise Killed

    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 5, "metrics": tmp_path / "m.jsonl"}
    with pytest.raises(Killed):
        run(on_step=die, **options)
    assert all_steps(tmp_path) == [5, 10]
    rest = run(**options)
    assert rest.start_step == 10 and all_steps(tmp_path) == [15, 20]
    same(rest.state, whole.state)
    assert [r["loss"] for r in read_metrics(tmp_path / "m.jsonl")] == losses(whole)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_gives_the_same_losses_to_rounding(whole, kind):
    result = run(**on_mesh(kind))
    np.testing.assert_allclose(losses(result), losses(whole), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), result.state, whole.state)


def test_resuming_on_another_topology_continues_to_rounding(whole, tmp_path):
    run(10, checkpoint_dir=tmp_path / "8", **on_mesh())
    for count in (1, 2, 4):
        shutil.copytree(tmp_path / "8", tmp_path / str(count))
        rest = run(20, checkpoint_dir=tmp_path / str(count), **(on_mesh(shape=(1, count)) if count > 1 else {}))
        np.testing.assert_allclose(losses(rest), losses(whole)[10:], rtol=1e-5)
        # The same order of data, to the token.
        counts = [[h["trained_tokens"] for h in history] for history in (rest.history, whole.history[10:])]
        assert counts[0] == counts[1]


def test_moments_lie_like_their_parameters():
    options = on_mesh()
    abstract = jax.eval_shape(lambda p: init_train_state(p, optimizer()), toy_params())
    shardings = state_shardings(abstract, options["mesh"], options["param_shardings"])
    split = [s.spec for s in jax.tree.leaves(shardings.opt_state) if s.spec != P()]
    assert split == [P("fsdp", None)] * 2  # the two moments of head.kernel
    assert shardings.step.spec == P()


def test_evaluation_does_not_change_the_trajectory(whole, tmp_path):
    seen = []

    def evaluate(params, step):
        seen.append(step)
        return {"bits_per_byte": jnp.sum(params["head"]["kernel"])}

    result = run(evaluate=evaluate, evaluate_every=8, metrics=tmp_path / "m.jsonl", log_every=5)
    assert seen == [8, 16, 20]
    assert losses(result) == losses(whole)
    same(result.state, whole.state)
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [r["step"] for r in lines] == [5, 8, 10, 15, 16, 20, 20]
    assert "eval/bits_per_byte" in lines[1] and "eval/bits_per_byte" in result.history[7]


def test_the_callers_parameters_are_left_alone():
    for params in (toy_params(), jax.tree.map(jnp.asarray, toy_params())):
        train(params, loader(), loss_fn=toy_loss, optimizer=optimizer(), total_steps=3)
        same(params, toy_params())


def test_a_loader_can_serve_two_runs(whole):
    data = loader()
    for _ in range(2):
        result = train(toy_params(), data, loss_fn=toy_loss, optimizer=optimizer(), total_steps=20)
        assert losses(result) == losses(whole)


def test_progress_and_learning_rate_are_reported():
    seen = []
    run(3, on_step=lambda step, values: seen.append((step, values["learning_rate"])), schedule=SCHEDULE)
    assert seen == [(n + 1, float(SCHEDULE(n))) for n in range(3)]


def poisoned(params, batch, denominator):
    # Only document 17 has labels 99.
    loss, metrics = toy_loss(params, batch, denominator)
    return loss + jnp.where(jnp.any(batch.labels == 99), jnp.nan, 0.0), metrics


def test_nan_stops_the_run_names_the_documents_and_spoils_no_checkpoint(tmp_path):
    docs = toy_records(40)
    docs[17].arrays["labels"][:] = 99
    data = loader(docs)
    bad = next(n for n in range(len(data)) if "doc17" in data.documents(n))
    options = {"docs": docs, "loss_fn": poisoned, "checkpoint_dir": tmp_path, "checkpoint_every": 1, "keep": None}
    with pytest.raises(FloatingPointError, match=rf"step {bad + 1} has loss nan.*doc17"):
        run(**options)
    assert all_steps(tmp_path) == list(range(1, bad + 1))
    if bad:
        with pytest.raises(FloatingPointError, match=f"step {bad + 1} "):
            run(**options)


def test_going_back_is_asked_for(whole, tmp_path, caplog):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 5, "keep": None}
    run(**options)
    with pytest.raises(InputError, match="up to step 20"):
        run(resume=False, **options)
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        run(resume_step=7, **options)
    back = run(resume_step=10, **options)
    assert back.start_step == 10 and "step 15" in caplog.text
    same(back.state, whole.state)


def test_a_damaged_checkpoint_is_gone_back_over_when_asked_and_its_step_saved_again(whole, tmp_path, caplog):
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 4, "keep": None}
    run(12, **options)
    for step in (8, 12):
        for file in (tmp_path / str(step) / "record").rglob("metadata"):
            file.write_bytes(b" " + file.read_bytes()[1:])
    with pytest.raises(InputError, match="is damaged"):
        run(**options)
    assert all_steps(tmp_path) == [4, 8, 12]
    back = run(faults=FaultPolicy(on_damaged_checkpoint="previous"), **options)
    assert back.start_step == 4 and "GOING BACK to step 4" in caplog.text
    assert all_steps(tmp_path) == [4, 8, 12, 16, 20]
    assert sorted(path.name for path in tmp_path.glob("*.damaged")) == ["12.damaged", "8.damaged"]
    same(back.state, whole.state)
    again = run(resume_step=12, **options)
    assert again.start_step == 12 and all_steps(tmp_path) == [4, 8, 12, 16, 20]
    same(again.state, whole.state)


def test_bad_arguments():
    with pytest.raises(InputError, match="total_steps is 10000"):
        run(10_000)
    with pytest.raises(InputError, match="together"):
        run(mesh=on_mesh()["mesh"])
    with pytest.raises(InputError, match="resume_step"):
        run(resume_step=3)
    docs = toy_records(5)
    for doc in docs:
        doc.arrays["mask"][:] = 0
    with pytest.raises(InputError, match="no position"):
        run(1, docs=docs)


def test_another_optimizer_is_refused_with_the_leaves(tmp_path):
    run(2, checkpoint_dir=tmp_path)
    other = make_optimizer(1e-3, weight_decay=0, clip_norm=None)
    with pytest.raises(InputError, match=r"opt_state.*not in the checkpoint"):
        train(toy_params(), loader(), loss_fn=toy_loss, optimizer=other, total_steps=4, checkpoint_dir=tmp_path)


def test_another_data_order_is_refused(tmp_path):
    run(2, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="another data order"):
        run(4, docs=toy_records(39), checkpoint_dir=tmp_path)
