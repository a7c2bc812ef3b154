"""Damage in any artefact of a run is found and named; --repair makes it again, of a capture the bad shards only."""

import json
import shutil

import numpy as np
import pytest

from fusejax.cli import main
from fusejax.config import load_config
from fusejax.io.hf import load_hf_model
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.store import Record, RecordWriter
from fusejax.stages.context import Run
from fusejax.stages.convert import export_run
from fusejax.stages.keep import keep_model
from fusejax.stages.run import run_stages
from fusejax.stages.verify import find_damage
from tests.stages.tiny import make_config

FLIPS = 220


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with an artefact of every kind; the model and its scores are put in place of trained ones."""
    root = tmp_path_factory.mktemp("verify")
    only = {"merge": None, "fusions": [{"name": "fused", "window_bytes": 32}], "sources": [str(root / "a")]}
    made = make_config(root, **only)
    run_stages(made, ("prepare", "capture", "align", "fuse"))
    config, params = load_hf_model(root / "target")
    keep_model(root / "run/models/fused", config, params, tokenizer_dir=root / "target", settings={"arm": "fused"})
    writer = RecordWriter(root / "run/scores/fused", kind="scores", settings={})
    writer.write(Record("0", {"index": 0, "n_bytes": 9}, {"realised_logprob": np.linspace(-9, 0, 40)}))
    writer.finish()
    export_run(Run(made))
    return root / "run"


@pytest.fixture
def copy(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def _artefacts(run):
    return sorted(path.parent for path in run.rglob(MANIFEST))


def _flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(data))


def _call(capsys, *words):
    code = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), err


def _contents(run, *parts):
    return {path: path.read_bytes() for part in parts for path in (run / part).rglob("*") if path.is_file()}


def test_a_flipped_bit_anywhere_is_found_and_named(finished_run):
    """`FLIPS` random bits, spread over every file of every kind of artefact, each put back afterwards."""
    rng = np.random.default_rng(0)
    files = [(d, path) for d in _artefacts(finished_run) for path in sorted(d.rglob("*")) if path.is_file()]
    kinds = {read_manifest(directory).kind for directory, _ in files}
    assert {"corpus", "captured", "aligned", "fused", "scores", "model", "export"} <= kinds
    assert {"vocabulary.npz", "partitions.npz", "lengths.npy", "model.safetensors"} <= {path.name for _, path in files}
    order = [files[i % len(files)] for i in range(max(FLIPS, len(files)))]
    for directory, path in order:
        whole = path.read_bytes()
        _flip(path, int(rng.integers(0, len(whole) * 8)))
        damage = find_damage([directory])
        path.write_bytes(whole)
        assert list(damage) == [directory], f"a flip in {path} was not found"
        assert list(damage[directory]) == [str(path.relative_to(directory))]
    assert find_damage(_artefacts(finished_run)) == {}


def test_the_damaged_record_is_named(copy, capsys):
    shard = copy / "captured" / "a" / "records-00001.array_record"
    _flip(shard, (shard.read_bytes().rindex(b"FJR3") + 30) * 8)
    code, found, _ = _call(capsys, "verify", copy)
    assert code == 2
    (line,) = found["bad"]
    assert line.startswith(f"{shard}: checksum differs")
    assert line.endswith("damaged records: 7")


def test_repair_recaptures_only_what_is_bad(copy, capsys):
    directory = copy / "captured" / "a"
    before = _contents(copy, "captured", "corpus", "aligned", "fused")
    for number, bit in ((0, 999), (3, 4321)):
        _flip(directory / f"records-0000{number}.array_record", bit * 8)
    kept = (directory / "records-00002.array_record").stat().st_ino
    code, found, err = _call(capsys, "verify", copy, "--repair")
    assert (code, found["bad"]) == (0, []), err
    (line,) = found["repaired"]
    assert "records-00000.array_record, records-00003.array_record made again, with the same bytes" in line
    assert (directory / "records-00002.array_record").stat().st_ino == kept
    after = _contents(copy, "captured", "corpus", "aligned", "fused")
    assert {p for p in before if before[p] != after[p]} <= {directory / MANIFEST}  # its facts hold seconds


@pytest.mark.parametrize("part", ["captured/a", "corpus"])
def test_repair_of_a_manifest_and_of_other_artefacts(copy, capsys, part):
    """A manifest that cannot be trusted, a corpus, aligned and fused records: all at once, parents first."""
    before = _contents(copy, "captured", "corpus", "aligned", "fused")
    for name in (part, "aligned/a", "fused/fused"):
        path = copy / name / ("train.arrow" if name == "corpus" else MANIFEST)
        data = path.read_bytes()
        _flip(path, (len(data) // 2 if name == "corpus" else data.rindex(b"positions") + 1) * 8)
    code, found, err = _call(capsys, "verify", copy, "--repair")
    assert (code, found["bad"]) == (0, []), err
    assert len(found["repaired"]) == 3
    after = _contents(copy, "captured", "corpus", "aligned", "fused")
    assert {p for p in before if before[p] != after[p]} <= {p for p in before if p.name == MANIFEST}


def test_an_export_is_made_again_where_anything_of_it_changed(copy, capsys):
    run = Run(load_config(copy / "config.yaml").model_copy(update={"output": str(copy)}))
    weights = copy / "export" / "model.safetensors"
    whole, node = weights.read_bytes(), weights.stat().st_ino
    export_run(run)
    assert weights.stat().st_ino == node  # what stands is left alone
    _flip(weights, 8 * (len(whole) - 5))
    export_run(run)
    assert weights.read_bytes() == whole
    assert "model.safetensors is damaged, making it again" in capsys.readouterr().err
    (copy / "export" / "config.json").unlink()
    export_run(run)
    assert (copy / "export" / "config.json").is_file()
    config, params = load_hf_model(copy.parent / "run" / "export")
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 2
    tokenizer_dir = copy / "export"
    keep_model(copy / "models/fused", config, params, tokenizer_dir=tokenizer_dir, settings={"arm": "another"})
    export_run(run)
    assert weights.read_bytes() != whole  # of another model
    weights.write_bytes(whole)
    code, found, _ = _call(capsys, "verify", copy / "export", "--repair")
    assert (code, found["bad"]) == (0, [])
    assert weights.read_bytes() != whole


def test_what_belongs_to_no_run_is_left_alone(copy, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.move(copy / "aligned" / "a", moved)
    _flip(moved / "lengths.npy", 8 * 130)
    code = main(["verify", str(moved), "--repair"])
    assert code == 2
    assert "belongs to no run" in capsys.readouterr().err
    assert (moved / "lengths.npy").is_file()
