"""The section `merge` of a configuration on the command line, also where the file has none."""

import pytest

from fusejax.stages.command import parse_config

TEXT = "output: runs/x\ntarget: a\nsources: [b]\ncorpus: {train: [{path: x.jsonl}]}\n"


@pytest.mark.parametrize("section", ["", "merge: {method: sce, parameters: {select_topk: 0.5}}\n"])
def test_options_of_a_merge(tmp_path, section):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT + section)
    words = ["--merge.method", "ties", "--merge.parameters.density", "0.3", "--seed", "4"]
    config = parse_config("merge", [str(path), *words, "--merge.parameters.weights", "1", "2"], "")
    assert config.seed == 4
    assert config.merge is not None
    assert config.merge.method == "ties"
    given = {"density": 0.3, "weights": [1, 2]}
    assert config.merge.parameters == ({"select_topk": 0.5} if section else {}) | given
    unchanged = parse_config("merge", [str(path)], "").merge
    assert (unchanged is None) == (section == "")
