"""Experiments: arms, seeds and tuning on a miniature; what is made once, what is refused, what the table says."""

import json

import pytest
import yaml

from fusejax.config.experiment import ExperimentConfig, load_experiment, run_config_of
from fusejax.errors import InputError
from fusejax.stages.experiments import command
from fusejax.stages.experiments.arms import Row
from fusejax.stages.experiments.results import markdown, summarize
from tests.paths import ROOT
from tests.stages.tiny import make_config

PLACES = {"models": "m", "data": "d"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An experiment file on the tiny models."""
    root = tmp_path_factory.mktemp("experiment")
    run = make_config(root).model_dump(mode="json", exclude_defaults=True)
    del run["output"], run["fusions"], run["merge"]
    run |= {"fusion": {"window_bytes": 32}, "corpus": run["corpus"] | {"seed": 0}}
    values = {
        "name": "mini",
        "title": "A miniature",
        "question": "Does it run?",
        "seeds": [0, 1],
        "tune": {"train.learning_rate": [1e-2, 1e-4]},
        "run": run,
        "arms": [
            {"name": "target", "model": "target", "seeds": [0]},
            {"name": "clm", "clm": True, "tune": True},
            {"name": "half, tuned", "clm_weight": 0.5, "tuned_as": "clm"},
            {"name": "merged", "merge": {"method": "linear", "targets": ["clm", "half, tuned"]}, "seeds": [0]},
            {"name": "both", "ensemble": ["clm", "source:a"], "seeds": [0]},
        ],
        "scales": {"longer": {"train.max_steps": 5}},
    }
    path = root / "mini.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.slow
def test_an_experiment_runs_once_and_says_what_it_found(written):
    out = written.parent / "out"
    words = ["run", str(written), "--out", str(out)]
    found = command("experiments", words)
    rows = {(row["arm"], row["seed"]): row for row in found.data["rows"]}
    assert set(rows) == {("target", 0), ("merged", 0), ("both", 0)} | {
        (a, s) for a in ("clm", "half, tuned") for s in (0, 1)
    }
    assert rows["clm", 0]["chosen"] == rows["half, tuned", 1]["chosen"] == 1e-2  # 1e-4 hardly moves in four steps
    assert rows["clm", 0]["bits_per_byte"] != rows["clm", 1]["bits_per_byte"]  # another order
    assert rows["clm", 0]["bits_per_byte"]["test"]["mean"] < rows["target", 0]["bits_per_byte"]["test"]["mean"]
    assert rows["half, tuned", 0]["supervised"] > 0.1 and rows["clm", 0]["supervised"] is None
    assert len(list((out / "captured").iterdir())) == 2 and len(list((out / "corpus").iterdir())) == 1
    made = json.loads((out / "results" / "mini.json").read_text())
    assert [row["arm"] for row in made["summary"]] == ["target", "clm", "half, tuned", "merged", "both"]
    assert "| half, tuned | 2 |" in (out / "results" / "mini.md").read_text()
    assert (out / "results" / "mini.png").stat().st_size > 1000
    # Everything stands: nothing is trained or evaluated again, and seeds and arms can be picked.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    again = command("experiments", [*words, "--arms", "half, tuned,clm", "--seeds", "1"])
    assert [(row["arm"], row["seed"]) for row in again.data["rows"]] == [("clm", 1), ("half, tuned", 1)]
    assert again.data["rows"][1] == rows["half, tuned", 1]
    assert "--arms 'half, tuned,clm' --seeds 1`" in (out / "results" / "mini.md").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}


def test_what_does_not_exist_is_refused(written):
    values = yaml.safe_load(written.read_text())
    clm = {"name": "clm", "clm": True}
    merge = {"targets": ["target", "source:a"]}
    for change, match in [
        (
            {"arms": [{"name": "clm", "clm": True, "set": {"train.learning_rat": 1}}]},
            "train.learning_rat.*learning_rate",
        ),
        ({"arms": [{"name": "clm", "model": "sauce:a"}]}, "source:a"),
        ({"baseline": "cml"}, "clm"),
        ({"arms": [clm, {"name": "m", "merge": merge | {"method": "varm"}}]}, "arm 'm': varm .*base"),
        (
            {"arms": [clm, {"name": "m", "merge": merge | {"method": "slerp", "base": "target"}}]},
            "slerp goes from the base",
        ),
        ({"arms": [{"name": "clm", "clm": True, "model": "target"}]}, "exclude each other"),
        ({"arms": [{"name": "clm", "clm": True, "tuned_as": "half"}]}, "tuned as 'half'"),
        ({"sedes": [0]}, "seeds"),
    ]:
        path = written.with_name("bad.yaml")
        path.write_text(yaml.safe_dump(values | change), encoding="utf-8")
        with pytest.raises(InputError, match=match):
            command("experiments", ["run", str(path), "--out", str(written.parent / "none")])
    assert not (written.parent / "none" / "models").exists()
    for words, match in [
        (["run"], "name of an experiment"),
        (["run", "nothing"], "no experiment 'nothing'"),
        (["run", str(written), "--arms", "hlaf"], "half"),
        (["run", str(written), "--seeds", "a"], "whole numbers"),
        (["run", str(written), "--scale", "tpu"], "longer"),
    ]:
        with pytest.raises(InputError, match=match):
            command("experiments", words)


def test_a_scale_and_an_extension_change_the_run(written):
    assert load_experiment(written, scale="longer").run["train"]["max_steps"] == 5
    extension = written.with_name("more.yaml")
    values = {
        "name": "more",
        "title": "More",
        "extends": written.name,
        "seeds": [3],
        "run": {"sources": [{"name": "c", "model": "{models}/c-{seed}"}], "train": {"epochs": 2}},
        "arms": [{"name": "clm", "clm": True}],
    }
    extension.write_text(yaml.safe_dump(values), encoding="utf-8")
    found = load_experiment(extension, scale="longer")
    config = run_config_of(found, found.arms[0], seed=3, places=PLACES, output="o")
    assert [source.name for source in config.sources] == ["a", "b", "c"]
    assert (config.sources[2].model, config.train.epochs, config.train.max_steps, config.seed) == ("m/c-3", 2, 5, 3)


def row(arm, seed, value, **changes):
    return Row(arm, seed, None, {"test": {"d": value, "mean": value}, "valid": {"mean": value}}, 10, 1.0, None, {})


def test_errors_are_those_of_differences_seed_by_seed():
    rows = [row("clm", 0, 2.0), row("clm", 1, 3.0), row("x", 0, 1.9), row("x", 1, 2.7), row("y", 1, 2.5)]
    found = {s.arm: s for s in summarize(rows, baseline="clm")}
    assert found["clm"].difference is None and found["clm"].error == pytest.approx(0.5)
    assert found["x"].difference == pytest.approx(-0.2) and found["x"].difference_error == pytest.approx(0.1)
    assert found["y"].difference == pytest.approx(-0.5) and found["y"].difference_error is None
    text = markdown(list(found.values()), baseline="clm", tuned=None)
    assert "| x | 2 | 2.3000 ± 0.4000 | −0.2000 ± 0.1000 |" in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_resolves(path):
    experiment = load_experiment(path)
    assert isinstance(experiment, ExperimentConfig) and experiment.name == path.stem
    for scale in (None, *experiment.scales):
        scaled = load_experiment(path, scale=scale)
        for arm in scaled.arms:
            run_config_of(scaled, arm, seed=0, places=PLACES, output="o")
