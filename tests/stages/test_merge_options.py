"""The merges of a configuration on the command line, also where the file has none."""

import pytest

from fusejax.errors import InputError
from fusejax.stages.command import parse_config

TEXT = "output: runs/x\ntarget: a\nsources: [b]\ncorpus: {train: [{path: x.jsonl}]}\n"
TWO = "merge: [{method: sce}, {name: own, method: varm, parameters: {granularity: tensor}}]\n"


@pytest.mark.parametrize("section", ["", "merge: {method: sce, parameters: {select_topk: 0.5}}\n"])
def test_options_of_a_merge(tmp_path, section):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT + section)
    words = ["--merge.method", "ties", "--merge.parameters.density", "0.3", "--seed", "4"]
    config = parse_config("merge", [str(path), *words, "--merge.parameters.weights", "1", "2"], "")
    assert config.seed == 4
    assert [(merge.name, merge.method) for merge in config.merge] == [("merged", "ties")]
    given = {"density": 0.3, "weights": [1, 2]}
    assert config.merge[0].parameters == ({"select_topk": 0.5} if section else {}) | given
    assert len(parse_config("merge", [str(path)], "").merge) == (section != "")


def test_several_merges_are_told_apart_by_their_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT + TWO)
    words = ["--merge.0.method=ties", "--merge.0.parameters.density", "0.3", "--merge.1.targets", "fused", "clm"]
    first, own = parse_config("run", [str(path), *words], "").merge
    assert (first.name, first.method, first.parameters) == ("merged-ties", "ties", {"density": 0.3})
    assert (own.name, own.method, own.targets) == ("own", "varm", ("fused", "clm"))
    assert own.parameters == {"granularity": "tensor"}
    assert parse_config("run", [str(path), "--merge.1.method", "sce"], "").merge[1].name == "own"
    with pytest.raises(InputError, match=r"0 \(merged-sce\), 1 \(own\)\. Say which: --merge\.0\.method"):
        parse_config("run", [str(path), "--merge.method", "ties"], "")
    with pytest.raises(InputError, match=r"no merge 2"):
        parse_config("run", [str(path), "--merge.2.parameters.t", "1"], "")
