"""A source given as distributions: the artefact of its capture, and what does not belong is refused by name."""

import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.data.interchange import export_parquet
from fusejax.data.interchange_layouts import export_distillkit, export_maxtext
from fusejax.errors import InputError
from fusejax.io.store import Record, RecordReader
from fusejax.stages.align import align
from fusejax.stages.capture import capture
from fusejax.stages.context import Run
from fusejax.stages.fuse import fuse
from fusejax.stages.prepare import prepare
from tests.stages import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A run whose sources were captured, exactly."""
    root = tmp_path_factory.mktemp("captured")
    made = tiny.make_config(root).model_dump(mode="json")
    made["capture"]["codec"] = "float32"
    made["fusions"] = made["fusions"][:1]
    run = Run(RunConfig.model_validate(made))
    run.start()
    for stage in (prepare, capture):
        stage(run)
    return run, list(RecordReader(run.captured_dir("a")))


def _imported(captured, root, **distributions) -> Run:
    """The same run with source `a` imported, from a directory that has its tokenizer alone."""
    made = captured[0].config.model_dump(mode="json") | {"output": str(root / "run")}
    made["sources"][0] |= {"model": made["sources"][0]["model"] + "-tokenizer", "distributions": distributions}
    run = Run(RunConfig.model_validate(made))
    run.start()
    prepare(run)
    return run


def test_parquet_gives_the_artefact_of_the_capture(captured, tmp_path):
    export_parquet(captured[1], tmp_path / "a.parquet")
    run = _imported(captured, tmp_path, path=str(tmp_path / "a.parquet"))
    manifest = capture(run)["a"]
    assert manifest.facts["imported"] and manifest.facts["labels_estimated"] == 0
    for before, after in zip(captured[1], RecordReader(run.captured_dir("a")), strict=True):
        assert after.doc_id == before.doc_id and after.header["n_bytes"] == before.header["n_bytes"]
        assert set(after.arrays) == set(before.arrays)
        for name, array in before.arrays.items():
            np.testing.assert_allclose(after.arrays[name], array, atol=2e-6)
    for stage in (align, fuse):
        stage(run)
    assert capture(run)["a"].fingerprint == manifest.fingerprint


@pytest.mark.parametrize("layout", ["maxtext", "distillkit"])
def test_other_layouts_know_all_but_some_labels(captured, tmp_path, layout):
    path = tmp_path / f"a.{'parquet' if layout == 'distillkit' else 'array_record'}"
    {"maxtext": export_maxtext, "distillkit": export_distillkit}[layout](captured[1], path)
    more = {"normalized": True} if layout == "maxtext" else {}
    run = _imported(captured, tmp_path, path=str(path), layout=layout, **more)
    facts, estimated = capture(run)["a"].facts, 0
    for before, after in zip(captured[1], RecordReader(run.captured_dir("a")), strict=True):
        known = (before.arrays["topk_ids"] == before.arrays["labels"][:, None]).any(axis=1)
        estimated += int((~known).sum())
        names = "topk_logprobs", "realised_logprob", "residual_logprob"
        for name, rows in zip(names, (slice(None), known, slice(None)), strict=True):
            np.testing.assert_allclose(after.arrays[name][rows], before.arrays[name][rows], atol=1e-3)
        assert (after.arrays["realised_logprob"][~known] < -1).all()
    assert facts["labels_estimated"] == estimated > 0


def _changed(records, edit):
    records = [Record(r.doc_id, r.header, {name: array.copy() for name, array in r.arrays.items()}) for r in records]
    return edit(records) or records


def _other_token(records):
    records[2].arrays["tokens"][3] += 1
    records[2].arrays["labels"][2] += 1


def _logits(records):
    records[0].arrays["topk_logprobs"] += 5


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_other_token, "row 2 is not document .* at position 3 it has token"),
        (lambda records: records[:-1], "ends before document"),
        (lambda records: records[::-1], "row 0 is not document .* same order"),
        (_logits, "expected log-probabilities"),
    ],
)
def test_a_file_that_does_not_belong_to_the_corpus_is_refused(captured, tmp_path, edit, said):
    export_parquet(_changed(captured[1], edit), tmp_path / "a.parquet")
    run = _imported(captured, tmp_path, path=str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=said):
        capture(run)
