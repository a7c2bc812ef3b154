"""The stages joined: a whole run, skipped when done, continued when cut, remade when settings change."""

import json
import shutil

import jax
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model
from fusejax.io.manifest import MANIFEST, read_manifest, verify_directory
from fusejax.io.models import open_config, open_model
from fusejax.io.store import RecordReader
from fusejax.stages.align import VOCABULARY
from fusejax.stages.context import Run
from fusejax.stages.plan_disk import BYTES_PER_TOKEN, disk_bytes
from fusejax.stages.report import report_run
from fusejax.stages.run import STAGES, run_stages
from tests.stages.tiny import make_config, texts, write_jsonl


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = make_config(root)
    run_stages(config)
    return root, config


def test_the_table_has_every_model(finished_run):
    root, _ = finished_run
    result = json.loads((root / "run" / "result.json").read_text())
    table = result["bits_per_byte"]
    assert list(table) == ["source:a", "source:b", "target", "clm", "fused", "mixed", "merged", "ensemble"]
    for row in table.values():
        assert set(row) == {"words", "mean"}
        assert 0 < row["words"] < 20
    assert table["fused"]["words"] < table["target"]["words"]
    assert (root / "run" / "report.html").read_text().startswith("<!")
    arms = {json.loads(line)["arm"] for line in (root / "run" / "metrics.jsonl").read_text().splitlines()}
    assert arms == {"clm", "fused", "mixed"}


def test_the_report_shows_what_sources_did(finished_run):
    root, _ = finished_run
    text = (root / "run" / "report.html").read_text()
    for expected in ("fused from a", "mixed from target", 'class="tok in"', "merged: sce of", "seconds, all calls"):
        assert expected in text, expected
    assert "Not there yet" not in text


def test_an_unfinished_run_has_a_report_that_says_what_is_missing(finished_run, tmp_path, monkeypatch):
    root, config = finished_run
    monkeypatch.setattr("fusejax.stages.report.environment", dict)
    shutil.copytree(root / "run", tmp_path / "run")
    for gone in ("models/mixed", "models/merged", "fused/mixed", "aligned/b"):
        shutil.rmtree(tmp_path / "run" / gone)
    (tmp_path / "run" / "result.json").unlink()
    with open(tmp_path / "run" / "train" / "mixed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    text = report_run(Run(config.model_copy(update={"output": str(tmp_path / "run")}))).read_text()
    for expected in (
        "Aligned distributions of b: ",
        "Fused targets of mixed: ",
        "Model mixed: its training is going on or was interrupted",
        "Merged models merged: ",
        "Results on held-out text: ",
        "fused from a",
    ):
        assert expected in text, expected
    assert "Model fused" not in text and 'id="results"' not in text
    shutil.rmtree(tmp_path / "run")
    assert (
        "its training has not begun" in report_run(Run(config.model_copy(update={"output": str(tmp_path)}))).read_text()
    )


def test_every_artefact_verifies(finished_run):
    root, _ = finished_run
    found = sorted((root / "run").rglob(MANIFEST))
    assert len(found) >= 12
    for path in found:
        assert verify_directory(path.parent) == []


def test_fused_records_name_symbols_of_the_target(finished_run):
    root, config = finished_run
    reader = RecordReader(root / "run" / "fused" / "mixed", kind="fused")
    with np.load(root / "run" / "aligned" / "a" / VOCABULARY, allow_pickle=False) as maps:
        symbols = set(maps["symbol_of_target"].tolist()) - {-1}
    supervised = 0
    for record in reader:
        arrays = record.arrays
        n = len(arrays["tokens"])
        assert arrays["ids"].shape == (n, 3, config.capture.top_k)
        used = arrays["partition"] >= 0
        np.testing.assert_allclose(arrays["weights"].sum(axis=1), used.any(axis=1), atol=1e-5)
        mass = np.exp(arrays["logprobs"].astype(np.float64)).sum(-1) + np.exp(arrays["residual_logprob"].astype(float))
        np.testing.assert_allclose(mass[used], 1.0, atol=5e-3)
        of_a = arrays["ids"][:, 1][arrays["partition"][:, 1] >= 0]
        assert set(of_a.ravel().tolist()) - {-1} <= symbols
        supervised += int(used.any(axis=1).sum())
    assert supervised == reader.manifest.facts["supervised"] > 0


def test_a_finished_run_does_nothing_more(finished_run):
    root, config = finished_run
    before = {path: path.stat().st_mtime_ns for path in (root / "run").rglob(MANIFEST)}
    run_stages(config, ("prepare", "capture", "align", "fuse", "train", "merge", "evaluate"))
    assert {path: path.stat().st_mtime_ns for path in (root / "run").rglob(MANIFEST)} == before


def test_the_export_holds_the_merged_bits(finished_run):
    root, _ = finished_run
    merged = open_model(root / "run" / "models" / "merged")
    _, exported = load_hf_model(root / "run" / "export")
    for a, b in zip(jax.tree.leaves(merged.params), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plan_knows_what_every_artefact_takes(finished_run):
    """Documents of a line each and models of 40 kB: blocks and headers show, so each bound says what it leaves out."""
    root, config = finished_run
    corpus = read_manifest(root / "run" / "corpus").facts["splits"]
    documents, tokens = corpus["train"]["documents"], round(corpus["train"]["bytes"] / BYTES_PER_TOKEN)
    found = disk_bytes(config, open_config(root / "target"), tokens=tokens, documents=documents)

    def real(*patterns):
        return sum(path.stat().st_size for p in patterns for path in (root / "run").glob(p) if path.is_file())

    shards = {"A1 captured": "captured/*/*.array_record", "A3 aligned": "aligned/*/*.array_record"}
    for name, pattern in (shards | {"A4 fused": "fused/*/*.array_record"}).items():
        assert found[name] == pytest.approx(real(pattern), rel=0.1), name
    assert found["A8 export"] == pytest.approx(real("export/*.safetensors"), rel=0.1), "in the target's float32"
    assert found["A7 models"] == 4 * found["A8 export"], "two fusions, the baseline and the merge"
    assert found["A7 models"] <= real("models/*/params/**/*") <= found["A7 models"] + 4 * 32 * 1024, "and Orbax' tables"
    assert real("aligned/*/vocabulary.npz") <= found["A2 maps"] <= 4 * real("aligned/*/vocabulary.npz"), "compressed"
    assert found["A0 corpus"] == pytest.approx(corpus["train"]["bytes"], abs=4)
    assert found["A0 corpus"] <= real("corpus/train.arrow") <= 2 * found["A0 corpus"], "names and offsets of 70 bytes"


def test_another_setting_remakes_only_what_depends_on_it(finished_run, tmp_path):
    root, config = finished_run
    copy = tmp_path / "run"
    shutil.copytree(root / "run", copy)
    changed = config.model_copy(
        update={"output": str(copy), "loss": config.loss.model_copy(update={"fusion_weight": 0.3})}
    )
    stages = ("prepare", "capture", "align", "fuse", "train")
    before = {p.parent.relative_to(copy): read_manifest(p.parent).fingerprint for p in copy.rglob(MANIFEST)}
    run_stages(changed, stages)
    after = {p.parent.relative_to(copy): read_manifest(p.parent).fingerprint for p in copy.rglob(MANIFEST)}
    remade = {str(name) for name in before if before[name] != after.get(name)}
    assert remade == {"models/fused", "models/mixed", "models/clm"}


def test_a_killed_capture_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    run_stages(config, ("prepare", "capture"))
    whole = read_manifest(tmp_path / "run" / "captured" / "a").files
    shutil.rmtree(tmp_path / "run" / "captured")

    from fusejax.io import store

    flushed = store.RecordWriter._flush

    def die_in_the_third(self):
        if self._shard == 2:
            raise KeyboardInterrupt
        flushed(self)

    monkeypatch.setattr(store.RecordWriter, "_flush", die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, ("capture",))
    monkeypatch.undo()
    assert len(list((tmp_path / "run" / "captured" / "a").glob("*.array_record"))) == 2
    run_stages(config, ("capture",))
    assert read_manifest(tmp_path / "run" / "captured" / "a").files == whole


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch):
    train = {"batch_size": 4, "seq_len": 32, "learning_rate": 1e-2, "max_steps": 6, "checkpoint_every": 2}
    config = make_config(tmp_path, train=train | {"baseline": False}, merge=None, fusions=[{"name": "fused"}])
    stages = ("prepare", "capture", "align", "fuse", "train")
    run_stages(config, stages)
    undisturbed = open_model(tmp_path / "run" / "models" / "fused").params
    shutil.rmtree(tmp_path / "run" / "models")
    shutil.rmtree(tmp_path / "run" / "train")

    from fusejax.io.checkpoint import StateWriter

    saved = StateWriter.save

    def die_after_four(self, step, *rest, **options):
        saved(self, step, *rest, **options)
        if step == 4:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(StateWriter, "save", die_after_four)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, ("train",))
    monkeypatch.undo()
    run_stages(config, ("train",))
    resumed = open_model(tmp_path / "run" / "models" / "fused").params
    for a, b in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/train/fused/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_looking_at_held_out_text_changes_nothing(tmp_path):
    config = make_config(tmp_path, merge=None, fusions=[{"name": "fused", "window_bytes": 32}])
    run_stages(config, ("prepare", "capture", "align", "fuse", "train"))
    plain = open_model(tmp_path / "run" / "models" / "fused").params
    shutil.rmtree(tmp_path / "run" / "models")
    shutil.rmtree(tmp_path / "run" / "train")
    looking = config.model_copy(update={"train": config.train.model_copy(update={"evaluate_every": 2})})
    run_stages(looking, ("train",))
    for a, b in zip(
        jax.tree.leaves(plain), jax.tree.leaves(open_model(tmp_path / "run/models/fused").params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "run/train/fused/metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["eval/valid_bits_per_byte"] for line in lines if "eval/valid_bits_per_byte" in line}
    assert list(curve) == [2, 4]
    assert all(0 < value < 20 for value in curve.values())


def test_a_mesh_trains_to_the_same_model(tmp_path):
    base = make_config(tmp_path, merge=None, fusions=[{"name": "fused", "window_bytes": 32}])
    run_stages(base, ("prepare", "capture", "align", "fuse", "train"))
    one = open_model(tmp_path / "run" / "models" / "fused").params
    meshed = base.model_copy(update={"mesh": base.mesh.model_copy(update={"data": 2, "fsdp": 2})})
    run_stages(meshed, ("train",))
    many = open_model(tmp_path / "run" / "models" / "fused").params
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_stages_out_of_order_say_which_is_missing(tmp_path):
    config = make_config(tmp_path)
    for stage, message in (("capture", "manifest"), ("align", "manifest"), ("train", "manifest"), ("export", "train")):
        with pytest.raises(InputError, match=message):
            run_stages(config, (stage,))


def test_the_stages_are_those_of_the_documentation():
    first, *others = STAGES
    assert first == "pretrain"
    assert others == ["prepare", "capture", "align", "fuse", "train", "merge", "evaluate", "export", "report"]


def test_a_changed_file_makes_a_new_corpus(tmp_path):
    config = make_config(tmp_path)
    run_stages(config, ("prepare",))
    first = read_manifest(tmp_path / "run" / "corpus").fingerprint
    write_jsonl(tmp_path / "train.jsonl", texts(50, seed=9))
    run_stages(config, ("prepare",))
    assert read_manifest(tmp_path / "run" / "corpus").fingerprint != first
