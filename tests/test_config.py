"""Configurations: every committed one resolves, and every mistake is named."""

import pytest
import yaml

from fusejax.config import RunConfig, load_config, save_config
from fusejax.errors import InputError
from tests.paths import ROOT

_MINIMAL = {
    "output": "runs/x",
    "target": "models/a",
    "sources": ["models/b"],
    "corpus": {"train": [{"path": "a.jsonl"}]},
}


def _file(tmp_path, values):
    path = tmp_path / "c.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_committed_configurations_resolve_and_round_trip(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_there_are_configurations():
    assert {"tinystories.yaml", "fusellm_llama2_7b.yaml"} <= {p.name for p in (ROOT / "configs").glob("*.yaml")}


def test_the_papers_recipe_is_the_published_one():
    config = load_config(ROOT / "configs" / "fusellm_llama2_7b.yaml")
    train, loss = config.train, config.loss
    assert (loss.clm_weight, loss.fusion_weight, loss.temperature, config.capture.top_k) == (0.9, 0.1, 1.0, 10)
    assert (train.learning_rate, train.batch_size, train.seq_len, train.epochs) == (1e-5, 128, 2048, 1)
    assert (train.warmup_ratio, train.adam_b1, train.adam_b2, train.weight_decay) == (0.008, 0.9, 0.95, 0.1)
    assert config.fusions[0].method == "min_ce"


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    path = _file(tmp_path, yaml.safe_dump(_MINIMAL) + "train: {learning_rate: 1e-5}\n")
    assert yaml.safe_load(path.read_text())["train"]["learning_rate"] == "1e-5"
    assert load_config(path).train.learning_rate == 1e-5


def test_names_default_to_the_last_part_of_the_path(tmp_path):
    config = load_config(_file(tmp_path, _MINIMAL))
    assert (config.target.name, config.sources[0].name) == ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, r"trian: unknown key. Did you mean 'train'"),
        ({"train": {"lerning_rate": 1}}, r"train.lerning_rate: unknown key. Did you mean 'learning_rate'"),
        ({"fusions": [{"methd": "min_ce"}]}, r"fusions.0.methd: unknown key. Did you mean 'method'"),
        ({"train": {"learning_rate": -1}}, r"train.learning_rate: .*greater than 0, got -1"),
        ({"sources": []}, r"sources: .*at least 1"),
        ({"sources": ["x/b", "y/b"]}, r"sources must have different names"),
        ({"fusions": [{"name": "clm"}]}, r"reserved"),
        ({"fusions": [{"sources": ["z"]}]}, r"names source 'z'"),
        ({"merge": {"targets": ["z"]}}, r"merge names targets"),
        ({"merge": [{"targets": ["z"]}, {"name": "x"}]}, r"merge 'merged-sce' names targets"),
        ({"merge": [{}, {"parameters": {}}]}, r"merges must have different names"),
        ({"merge": [{"name": "clm"}]}, r"merge names \['clm'\] are reserved"),
        ({"merge": [{"name": "source-b"}]}, r"merge names \['source-b'\] are reserved"),
        ({"merge": [{"name": "fused"}]}, r"fusions and merges must have different names"),
        ({"merge": [{"methd": "sce"}]}, r"merge.0.methd: unknown key. Did you mean 'method'"),
        ({"evaluate": {"ensemble": True, "ensembles": ["top1"]}}, r"ensemble must be true or false"),
        ({"evaluate": {"ensembles": ["top1", "top1"]}}, r"once"),
        ({"evaluate": {"ensembles": ["weighted"]}, "corpus": {"train": [{"path": "a"}], "valid_fraction": 0}}, "valid"),
        ({"fusions": [{"name": "ensemble-top1"}]}, r"reserved"),
        ({"merge": "sce"}, r"merge: must be a merge, .* or a list"),
        ({"merge": {}, "export": "mergd"}, r"export names 'mergd'. Did you mean 'merged'"),
        ({"fusions": []}, r"fusions: .*at least 1"),
        ({"fusions": [{"name": "base"}]}, r"reserved"),
        ({"fusions": [{"sources": ["b", "b"]}]}, r"names a source twice"),
        ({"sources": [{"model": "x/b", "name": "target"}], "fusions": [{"include_target": True}]}, r"called 'target'"),
        ({"merge": {"targets": ["clm"]}, "train": {"baseline": False}}, r"merge names targets \['clm'\]"),
        ({"train": {"batch_size": 6, "accumulation": 4}}, r"batch_size 6 must be a multiple of .* = 4"),
        ({"train": {"batch_size": 8}, "mesh": {"data": 3, "fsdp": 2}}, r"batch_size 8 must be a multiple of .* = 6"),
        (
            {"train": {"seq_len": 33}, "mesh": {"tensor": 2}, "memory": {"sequence_parallel": True}},
            r"multiple of mesh.tensor, got 33 and 2",
        ),
        ({"loss": {"divergence": "reverse_kl", "tail": "zero"}}, r"needs tail bucket"),
        ({"corpus": {"train": [{"path": "x", "domain": "mean"}]}}, r"may not be called 'mean'"),
        ({"loss": {"clm_weight": 0, "fusion_weight": 0}}, r"nothing would be trained"),
        ({"target": {"model": "a/..", "name": "../x"}}, r"no plain name"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_config(_file(tmp_path, _MINIMAL | change))


def test_one_merge_is_called_merged_and_those_of_a_list_after_their_methods(tmp_path):
    one = load_config(_file(tmp_path, _MINIMAL | {"merge": {"method": "ties"}}))
    assert [merge.name for merge in one.merge] == ["merged"] and one.exported == "merged"
    listed = [{"method": "ties"}, {}, {"name": "own", "method": "varm"}]
    several = load_config(_file(tmp_path, _MINIMAL | {"merge": listed}))
    assert [merge.name for merge in several.merge] == ["merged-ties", "merged-sce", "own"]
    assert several.exported == "merged-ties"
    assert load_config(_file(tmp_path, _MINIMAL | {"merge": listed, "export": "own"})).exported == "own"
    assert load_config(_file(tmp_path, _MINIMAL)).exported == "fused"
    for config in (one, several):
        save_config(config, tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("evaluate", "ensembles"),
    [({}, ("mean",)), ({"ensemble": True}, ("mean",)), ({"ensemble": False}, ()), ({"ensembles": []}, ())],
)
def test_ensembles_are_listed_or_switched(tmp_path, evaluate, ensembles):
    assert load_config(_file(tmp_path, _MINIMAL | {"evaluate": evaluate})).evaluate.ensembles == ensembles


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "just text"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"c\.yaml"):
        load_config(_file(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_every_field_is_described():
    def check(schema, where):
        for name, field in schema.get("properties", {}).items():
            nested = "$ref" in str(field)
            assert field.get("description") or nested, f"{where}.{name} has no description"

    schema = RunConfig.model_json_schema()
    check(schema, "RunConfig")
    for name, part in schema["$defs"].items():
        check(part, name)
        assert len(part["properties"]) <= 20, f"{name} has {len(part['properties'])} fields, expected at most 20"
