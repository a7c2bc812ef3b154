"""Several merges in one run: each a model and a row of the table, made once, and made anew alone."""

import json

import jax
import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model
from fusejax.io.manifest import MANIFEST
from fusejax.io.models import open_model
from fusejax.stages.context import Run
from fusejax.stages.keep import keep_model
from fusejax.stages.merge import merge_run
from fusejax.stages.repair import repair
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config

_STAGES = ("merge", "evaluate", "export")
_MERGES = [{"method": "linear"}, {"name": "ta", "method": "task_arithmetic", "parameters": {"scale": 0.25}}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run whose two targets stand as if they had been trained."""
    root = tmp_path_factory.mktemp("merges")
    config = _config(root)
    base = open_model(root / "target")
    for number, fusion in enumerate(config.fusions):
        rng = np.random.default_rng(number)
        params = jax.tree.map(lambda x, rng=rng: (x + 0.05 * rng.normal(size=x.shape)).astype(x.dtype), base.params)
        where = Run(config).model_dir(fusion.name)
        keep_model(where, base.config, params, tokenizer_dir=root / "target", settings={"seed": number})
    run_stages(config, ("prepare", *_STAGES))
    return root


def _config(root, *more, **changes) -> RunConfig:
    changes = {"sources": [str(root / "a")], "merge": [*_MERGES, *more]} | changes
    changes["train"] = {"baseline": False, "seq_len": 32}
    return make_config(root, **changes)


def _stamps(root):
    return {str(p.parent.relative_to(root / "run")): p.stat().st_mtime_ns for p in (root / "run").rglob(MANIFEST)}


def _params(directory):
    return jax.tree.leaves(open_model(directory).params)


def test_every_merge_is_a_model_and_a_row(root):
    table = json.loads((root / "run" / "result.json").read_text())["bits_per_byte"]
    assert list(table)[-4:] == ["mixed", "merged-linear", "ta", "ensemble"]
    models = root / "run" / "models"
    start = _params(root / "target")
    both = zip(_params(models / "fused"), _params(models / "mixed"), strict=True)
    for origin, (a, b), linear, arithmetic in zip(
        start, both, _params(models / "merged-linear"), _params(models / "ta"), strict=True
    ):
        np.testing.assert_allclose(linear, (a + b) / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(arithmetic, origin + 0.25 * (a - origin + b - origin), rtol=1e-5, atol=1e-6)
    assert table["merged-linear"] != table["ta"]


def test_one_more_merge_makes_only_itself_and_its_scores(root):
    before = _stamps(root)
    run_stages(_config(root, {"method": "varm"}), _STAGES)
    after = _stamps(root)
    assert {name for name in after if after[name] != before.get(name)} == {"models/merged-varm", "scores/merged-varm"}
    assert "merged-varm" in json.loads((root / "run" / "result.json").read_text())["bits_per_byte"]
    run_stages(_config(root, {"method": "varm"}), ("merge",))
    assert _stamps(root) == after


def test_every_model_answers_the_tasks_of_the_run_once(root):
    options = ["the cat", "a dog", "two hills"]
    rows = [{"question": "it rained while", "options": options, "label": label} for label in options * 3]
    task = root / "choice.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    evaluate = {"context": 32, "batch_tokens": 128, "tasks": [str(task)], "task_limit": 6}
    run_stages(_config(root, evaluate=evaluate), ("evaluate",))
    result = json.loads((root / "run" / "result.json").read_text())
    assert list(result["tasks"]) == ["source:a", "target", "fused", "mixed", "merged-linear", "ta"]
    assert "accuracy" in result["table"]
    for found in result["tasks"].values():
        # The same question with each answer in turn: whatever the model prefers, it is right in a third of them.
        values = found[str(task)]
        assert (values["examples"], values["accuracy"], values["accuracy_per_byte"]) == (6, 1 / 3, 1 / 3)
    before = _stamps(root)
    run_stages(_config(root, evaluate=evaluate), ("evaluate",))
    assert _stamps(root) == before
    with pytest.raises(InputError, match=r"has 9 examples, evaluate\.task_fewshot shows 9"):
        run_stages(_config(root, evaluate=evaluate | {"task_fewshot": 9}), ("evaluate",))
    with pytest.raises(InputError, match="no task file at"):
        run_stages(_config(root, evaluate=evaluate | {"tasks": ["none.jsonl"]}))


def test_the_first_is_exported_or_the_one_that_is_named(root):
    for name, changes in (("ta", {"export": "ta"}), ("mixed", {"export": "mixed"}), ("merged-linear", {})):
        run_stages(_config(root, **changes), ("export",))
        _, exported = load_hf_model(root / "run" / "export")
        for a, b in zip(_params(root / "run" / "models" / name), jax.tree.leaves(exported), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_damaged_merge_is_made_again_by_merge(root):
    run_stages(_config(root), _STAGES)
    before, params = _stamps(root), _params(root / "run" / "models" / "ta")
    repair({root / "run" / "models" / "ta": {"merge.json": "is missing"}})
    assert {name for name, stamp in _stamps(root).items() if stamp != before[name]} == {"models/ta"}
    for a, b in zip(params, _params(root / "run" / "models" / "ta"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_missing_target_is_told_before_anything_is_merged(tmp_path):
    config = make_config(tmp_path, merge=[{"targets": ["fused"]}, {"name": "x"}])
    base = open_model(tmp_path / "target")
    keep_model(Run(config).model_dir("fused"), base.config, base.params, tokenizer_dir=tmp_path / "target", settings={})
    with pytest.raises(InputError, match=r"merge 'x' takes .*mixed, which is not there: train it first"):
        merge_run(Run(config))
    assert not Run(config).model_dir("merged-sce").exists()
