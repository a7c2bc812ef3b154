"""Stages that run alone refuse what was made from something else, and say both values."""

import json
import shutil

import pytest

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.io.manifest import read_manifest
from fusejax.stages.capture_size import documents_per_shard
from fusejax.stages.context import Run
from fusejax.stages.lineage import check_aligned, check_captured
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config, make_model


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A run of one source up to `align`, with shards whose size follows from the text."""
    root = tmp_path_factory.mktemp("lineage")
    capture = {"top_k": 4, "context": 32, "batch_tokens": 256}
    config = make_config(root, sources=[str(root / "a")], fusions=[{"name": "fused"}], merge=None, capture=capture)
    run_stages(config, ("prepare", "capture", "align"))
    return config


def _changed(config, **sections):
    values = config.model_dump(mode="json")
    for section, change in sections.items():
        values[section] = values[section] | change
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, r"captured.a was made with top_k = 4, the configuration says 5; run `fusejax capture`"),
        ({"context": 16}, r"made with context = 32, the configuration says 16"),
        ({"codec": "float16"}, r"made with codec = 'compact', the configuration says 'float16'"),
        ({"compute_dtype": "bfloat16"}, r"compute_dtype = 'float32', the configuration says 'bfloat16'"),
    ],
)
def test_align_alone_refuses_another_capture(material, change, message):
    with pytest.raises(InputError, match=message):
        run_stages(_changed(material, capture=change), ("align",))


def test_what_changes_only_the_pace_is_no_other_capture(material):
    run = Run(_changed(material, capture={"batch_tokens": 64, "shard_size": 3}))
    check_captured(run, "a")
    check_aligned(run, "a")


def test_fuse_alone_refuses_another_alignment(material):
    with pytest.raises(InputError, match=r"aligned.a was made with vocabulary = 'coarse', the configuration says 'ex"):
        run_stages(_changed(material, align={"vocabulary": "exact"}), ("fuse",))
    with pytest.raises(InputError, match=r"captured.a was made with top_k = 4"):
        run_stages(_changed(material, capture={"top_k": 5}), ("fuse",))


def test_other_weights_are_refused_and_missing_ones_are_not(material, tmp_path):
    shutil.copytree(material.output, tmp_path / "run")
    source = tmp_path / "a"
    shutil.copytree(material.sources[0].model, source)
    config = material.model_copy(
        update={"output": str(tmp_path / "run"), "sources": (type(material.sources[0])(model=str(source)),)}
    )
    check_captured(Run(config), "a")
    other = make_model(tmp_path / "other", kind="byte_bpe", seed=9)
    shutil.copy(other / "model.safetensors", source / "model.safetensors")
    with pytest.raises(InputError, match=r"captured from weights \w+, a now holds \w+|captured from weights"):
        check_captured(Run(config), "a")
    (source / "model.safetensors").unlink()
    check_captured(Run(config), "a")


def test_another_corpus_is_refused(material, tmp_path):
    shutil.copytree(material.output, tmp_path / "run")
    run = Run(material.model_copy(update={"output": str(tmp_path / "run")}))
    path = run.captured_dir("a") / "manifest.json"
    values = json.loads(path.read_text())
    values["parents"]["corpus"] = "another"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"made from another corpus than"):
        check_captured(run, "a")


def test_shards_have_the_documents_that_make_their_size(material):
    run = Run(material)
    text = read_manifest(run.corpus_dir).facts["splits"]["train"]
    expected = documents_per_shard(text["documents"], text["bytes"], top_k=4, codec="compact")
    for directory in (run.captured_dir("a"), run.aligned_dir("a")):
        assert read_manifest(directory).settings["shard_size"] == expected
    sizes = [documents_per_shard(1000, 1000 * size, top_k=10, codec="compact") for size in (100, 4000, 400_000)]
    assert sizes[0] > 4000 > sizes[1] > 150 > sizes[2] >= 1
    assert documents_per_shard(10**6, 10**6, top_k=10, codec="compact") <= 2**16
    assert documents_per_shard(1, 10**9, top_k=10, codec="float32") == 1
