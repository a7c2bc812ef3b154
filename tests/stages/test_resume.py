"""Trainings that go on otherwise than they began: on another topology, or with settings that make another training."""

import json
import shutil

import jax
import numpy as np
import pytest

from fusejax.cli import main
from fusejax.config import save_config
from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.checkpoint import all_steps
from fusejax.io.manifest import read_manifest, write_manifest
from fusejax.models import ModelConfig, init_params
from fusejax.stages import train as stage
from fusejax.stages.fit import Optimization, fit, own_batch_rows, placement
from fusejax.stages.resume import determining, finished_model, settle
from fusejax.stages.run import run_stages
from fusejax.train.faults import FaultPolicy
from fusejax.train.metrics import read_metrics
from tests.stages.tiny import make_config, make_model
from tests.train.toy import VOCAB, toy_records

STEPS = 7
# Of the losses of seven steps at a learning rate of 1e-2: another mesh adds up in another order, and nothing else.
ROUNDING = 1e-5


class Killed(Exception):
    """Stands for a kill: nothing of the loop answers to it."""


def die_at_the_end(step, values):
    """Sees the steps of a training and ends it before the last is saved: so it tells all losses, and can go on."""
    if step == STEPS:
        raise Killed


def losses(directory):
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl")]


CFG = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=2, max_positions=16
)
EIGHT_BITS = Optimization(1e-2, moments_dtype="int8")


def fitted(directory, *, mesh=None, watch=None, optimization=EIGHT_BITS, on_changed="stop", accumulation=1):
    mesh = {"data": 1, "fsdp": 1, "tensor": 1} | (mesh or {})
    rows = own_batch_rows(placement(CFG, mesh), 8, "batch_size")
    return fit(
        "toy",
        jax.tree.map(np.asarray, init_params(CFG, jax.random.key(0))),
        CFG,
        FusionLoader(toy_records(40), rows=rows, batch_size=8, seq_len=16, epochs=4, use_targets=False),
        directory,
        optimization=optimization,
        loss={"clm_weight": 1.0, "fusion_weight": 0.0},
        groups=None,
        identity={"seed": 0},
        replaces=directory.with_name("model"),
        mesh=mesh,
        max_steps=STEPS,
        accumulation=accumulation,
        checkpoint_every=4,
        log_every=1,
        faults=FaultPolicy(on_changed_settings=on_changed),
        watch=watch,
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A Llama with moments in 8 bits, killed on fsdp x tensor before its last state was saved."""
    directory = tmp_path_factory.mktemp("stopped") / "train"
    with pytest.raises(Killed):
        fitted(directory, mesh={"fsdp": 2, "tensor": 2}, watch=die_at_the_end)
    assert all_steps(directory / "checkpoints") == [4]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), [({}, 2), ({"fsdp": 4}, 1)], ids=["one-accumulated", "fsdp4"])
def test_a_training_goes_on_upon_another_mesh(stopped, tmp_path, capsys, mesh, accumulation):
    directory = shutil.copytree(stopped, tmp_path / "train")
    assert fitted(directory, mesh=mesh, accumulation=accumulation).start_step == 4
    assert "mesh.tensor: 2 then, 1 now" in capsys.readouterr().err
    np.testing.assert_allclose(losses(directory), losses(stopped), rtol=ROUNDING)
    assert json.loads((directory / "plan.json").read_text())["how"]["accumulation"] == accumulation


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused_by_name_and_kept(stopped, tmp_path, monkeypatch, capsys):
    directory = shutil.copytree(stopped, tmp_path / "train")
    write_manifest(_made(tmp_path / "model"), kind="model", settings={})
    before = contents(tmp_path)
    other = EIGHT_BITS._replace(learning_rate=2e-2)
    with pytest.raises(InputError, match=r"up to step 4.*\n  optimization\.learning_rate: 0\.01 then, 0\.02 now\nSet"):
        fitted(directory, optimization=other)
    (directory / "plan.json").write_text(json.dumps({"plan": "of a version that said no more"}))
    with pytest.raises(InputError, match=r"up to step 4 and its plan\.json does not say of which settings"):
        fitted(directory)
    (directory / "plan.json").write_bytes(before[(directory / "plan.json").relative_to(tmp_path)])
    assert contents(tmp_path) == before
    monkeypatch.setattr("fusejax.stages.fit.train_loop", lambda *_, **options: options["checkpoint_dir"])
    assert not fitted(directory, optimization=other, on_changed="restart").exists()
    kept = {path.parts: data for path, data in contents(tmp_path).items() if path.parts[0] != "train"}
    assert kept == {(f"{path.parts[0]}.replaced", *path.parts[1:]): data for path, data in before.items()}
    assert "what was there is kept as train.replaced" in capsys.readouterr().err


def _made(directory):
    directory.mkdir()
    (directory / "weights").write_text("hours of work")
    return directory


def test_nothing_that_was_set_aside_is_overwritten(tmp_path):
    how = {"mesh": {"fsdp": 2}}
    for seed in range(3):
        settle(tmp_path / "train", {"seed": seed}, how, on_changed="stop")
        (tmp_path / "train" / "metrics.jsonl").write_text(str(seed))
    names = ["train", "train.replaced", "train.replaced-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name / "metrics.jsonl").read_text() for name in names] == ["2", "0", "1"]
    settle(tmp_path / "train", {"seed": 2}, {"mesh": {"fsdp": 1}}, on_changed="stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_model_whose_manifest_tells_of_its_mesh_is_the_same_model(tmp_path):
    settings = {"seed": 1, "mesh": {"fsdp": 8}, "train": {"remat": "full", "accumulation": 4, "learning_rate": 1e-5}}
    settings |= {"memory": {"attention": "xla", "sequence_parallel": True, "param_dtype": "float32"}}
    write_manifest(_made(tmp_path / "model"), kind="model", settings=settings, parents={"fused": "f"})
    now = {"seed": 1, "train": {"learning_rate": 1e-5}, "memory": {"param_dtype": "float32"}}
    assert determining(settings) == now
    assert finished_model(tmp_path / "model", settings=now, parents={"fused": "f"})
    assert not finished_model(tmp_path / "model", settings=now | {"seed": 2}, parents={"fused": "f"})
    assert not finished_model(tmp_path / "model", settings=now, parents={"fused": "g"})


@pytest.mark.slow
def test_the_command_goes_on_upon_another_mesh_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    changes = {"merge": None, "fusions": [{"name": "fused", "sources": ["a"], "window_bytes": 32}]}
    config = make_config(tmp_path, **changes)
    shutil.rmtree(tmp_path / "target")
    make_model(tmp_path / "target", kind="spm_bpe", seed=2, num_layers=1)
    options = {"baseline": False, "max_steps": STEPS, "checkpoint_every": 4}
    config = config.model_copy(update={"sources": config.sources[:1], "train": config.train.model_copy(update=options)})
    run_stages(config, ("prepare", "capture", "align", "fuse"))
    save_config(config, tmp_path / "config.yaml")
    command = ["train", str(tmp_path / "config.yaml")]
    directory, began = tmp_path / "run" / "train" / "fused", []
    monkeypatch.setattr(stage, "ShareAlarm", lambda *_: die_at_the_end)
    with pytest.raises(Killed):
        main([*command, "--mesh.fsdp", "2"])
    monkeypatch.undo()
    before, whole = contents(directory), losses(directory)
    capsys.readouterr()
    assert main([*command, "--train.learning-rate", "0.02"]) == 2
    said = capsys.readouterr().err
    assert "train.learning_rate: 0.01 then, 0.02 now\n" in said and "optimization" not in said
    assert contents(directory) == before and all_steps(directory / "checkpoints") == [4]

    def watched(*arguments, **given):
        result = fit(*arguments, **given)
        began.append(result.start_step)
        return result

    monkeypatch.setattr(stage, "fit", watched)
    moved = ["--mesh.fsdp", "1", "--train.accumulation", "2", "--train.remat", "full", "--memory.attention", "xla"]
    assert main([*command, *moved]) == 0
    assert began == [4]
    assert "mesh.fsdp: 2 then, 1 now; accumulation: 1 then, 2 now" in capsys.readouterr().err
    np.testing.assert_allclose(losses(directory), whole, rtol=ROUNDING)
    model = tmp_path / "run" / "models" / "fused"
    assert read_manifest(model).facts["how"]["accumulation"] == 2
    assert main([*command, "--mesh.fsdp", "4"]) == 0 and began == [4]  # it is finished
