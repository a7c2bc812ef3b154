"""The command line: exit codes, the last line with --json, and a message for each bad input."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusejax.cli import COMMANDS, main
from fusejax.config import save_config
from fusejax.io.hf import load_hf_model
from fusejax.io.manifest import MANIFEST
from tests.paths import ROOT
from tests.stages.tiny import make_config, make_model, texts, write_jsonl


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A configuration and the models and text that it names; tests copy it before they break it."""
    root = tmp_path_factory.mktemp("material")
    save_config(make_config(root), root / "run.yaml")
    return root


@pytest.fixture
def place(material, tmp_path):
    """The material in a directory of its own."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "run.yaml").read_text().replace(str(material), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path


def _call(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def _json(capsys, *words):
    code, out, err = _call(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def _refused(capsys, message, *words, code=2):
    found, _, err = _call(capsys, *words)
    assert found == code, err
    assert "Traceback" not in err
    assert message in err, err
    return err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    if name == "schema":
        assert "properties" in _json(capsys, name)
        return
    code, out, _ = _call(capsys, name, "--help")
    assert code == 0
    assert "usage" in out.lower()


def test_the_commands_of_the_design(capsys):
    promised = "quickstart run prepare capture align fuse train merge export import evaluate inspect report verify env"
    assert set(promised.split()) <= set(COMMANDS)
    code, out, _ = _call(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_an_unknown_command_suggests_one(capsys):
    _refused(capsys, "Did you mean 'capture'?", "captur")


def test_run_on_the_command_line(place, capsys):
    stages = "prepare,capture,align,fuse,train,merge,evaluate"
    words = ("--train.max-steps", "2", "--train.tensorboard", "--stages", stages)
    found = _json(capsys, "run", place / "run.yaml", *words)
    (board,) = (place / "run" / "train" / "fused" / "tensorboard").iterdir()
    assert all(name in board.read_bytes() for name in (b"loss", b"clm_nats", b"tokens_per_second"))
    assert set(found["bits_per_byte"]) >= {"source:a", "source:b", "target", "clm", "fused", "merged", "ensemble"}
    bad = _json(capsys, "verify", place / "run")
    assert bad["bad"] == []
    shown = _json(capsys, "inspect", place / "run" / "fused" / "fused", "--record", "0")
    assert shown["record"]["arrays"]["ids"]["shape"][1:] == [1, 4]
    merged = place / "run" / "models" / "merged"
    out = _json(capsys, "export", "--model", merged, "--out", place / "hf")
    again = _json(capsys, "import", "--model", place / "hf", "--out", place / "ckpt")
    assert out["parameters"] == again["parameters"]
    scores = {}
    data = write_jsonl(place / "held.jsonl", texts(9, seed=5))
    for name in (merged, place / "hf", place / "ckpt"):
        scores[name] = _json(capsys, "evaluate", "--model", name, "--data", data)
    assert len({score["bits_per_byte"] for score in scores.values()}) == 1
    score = scores[merged]
    assert score["documents"] == 9
    assert score["bytes"] == sum(len(text.encode()) for text in texts(9, seed=5))
    assert score["bits_per_byte"] == pytest.approx(score["nll_nats"] / np.log(2) / score["bytes"])

    shard = next((place / "run" / "captured" / "a").glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[1000] ^= 4
    shard.write_bytes(bytes(data))
    code, out, _ = _call(capsys, "verify", place / "run", "--json")
    assert code == 2
    assert shard.name in json.loads(out.splitlines()[-1])["bad"][0]


def test_merge_on_the_command_line(place, capsys):
    make_model(place / "t1", kind="spm_bpe", seed=2)
    config, params = load_hf_model(place / "target")
    from fusejax.io.hf import save_hf_model

    moved = jax.tree.map(lambda x: (x + 0.5).astype(x.dtype), params)
    save_hf_model(place / "t2", config, moved, tokenizer_dir=place / "target")
    words = ["--base", place / "target", "--targets", place / "target", place / "t2", "--out", place / "m"]
    found = _json(capsys, "merge", "--method", "linear", *words, "--weights", "3", "1")
    assert found["parameters"] == {"weights": [3, 1]}
    _, merged = load_hf_model(place / "m")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(b, a + 0.125, atol=1e-6)
    _refused(capsys, "not an empty directory", "merge", "--method", "linear", *words)
    words[-1] = place / "m2"
    _refused(capsys, "Did you mean 'linear'?", "merge", "--method", "linaer", *words)
    _refused(capsys, "Did you mean", "merge", "--method", "linear", *words, "--wieghts", "3", "1")
    assert not (place / "m2").exists()


def test_align_two_tokenizers(place, capsys):
    found = _json(
        capsys, "align", "--source-tokenizer", place / "a", "--target-tokenizer", place / "target",
        "--data", place / "train.jsonl", "--report",
    )  # fmt: skip
    assert found["positions"] == found["aligned"] + found["conditioned"] + found["dropped"]
    assert 0.9 < found["symbol_agreement"] <= 1
    assert found["positions_per_second"] > 0
    both = ("--source-tokenizer", place / "a", "--target-tokenizer", place / "a")
    same = _json(capsys, "align", *both, "--data", place / "train.jsonl")
    assert (same["symbol_agreement"], same["dropped"]) == (1.0, 0)


def test_dry_run_writes_nothing(place, capsys):
    found = _json(capsys, "run", place / "run.yaml", "--dry-run")
    stages = [step["stage"] for step in found["dry_run"]]
    assert stages[0] == "prepare"
    assert {"capture", "align", "fuse", "train", "merge", "evaluate", "export", "report"} <= set(stages)
    assert not (place / "run").exists()


def test_configuration_mistakes(place, capsys):
    _refused(capsys, "no configuration file", "run", place / "none.yaml")
    _refused(capsys, "usage: fusejax capture CONFIG", "capture")
    _refused(capsys, "Did you mean 'capture'?", "run", place / "run.yaml", "--stages", "captur")
    code, _, err = _call(capsys, "run", place / "run.yaml", "--train.learning-rat", "1")
    assert code == 2
    assert "learning-rate" in err
    _refused(capsys, "learning_rate", "run", place / "run.yaml", "--train.learning-rate", "-1")


def _rewrite(directory, change):
    """Applies `change` to the tensors of a model."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_and_bad_weights(place, capsys):
    words = ("capture", place / "run.yaml")
    _call(capsys, "prepare", place / "run.yaml")
    weights = place / "a" / "model.safetensors"
    good = weights.read_bytes()
    weights.unlink()
    _refused(capsys, str(place / "a"), *words)
    weights.write_bytes(good[: len(good) // 2])
    _refused(capsys, "model.safetensors", *words)
    weights.write_bytes(good)

    def poison(tensors):
        tensors["model.norm.weight"][3] = np.nan

    _rewrite(place / "a", poison)
    _refused(capsys, "model.norm.weight", *words)
    weights.write_bytes(good)

    def drop(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    _rewrite(place / "a", drop)
    _refused(capsys, "model.layers.1.mlp.up_proj.weight", *words)
    weights.unlink()
    (place / "a" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    _refused(capsys, "pickled weights", *words)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "link.safetensors"])
def test_an_index_that_leaves_the_directory_is_refused(place, capsys, name):
    _call(capsys, "prepare", place / "run.yaml")
    source = place / "a"
    (source / "model.safetensors").rename(place / "x.safetensors")
    os.symlink(place / "x.safetensors", source / "link.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(capsys, name, "capture", place / "run.yaml")


def test_a_tokenizer_larger_than_the_model(place, capsys):
    make_model(place / "small", kind="byte_bpe", seed=3, padded=-5)
    words = ("--model", place / "small", "--data", place / "train.jsonl")
    _refused(capsys, "makes ids up to", "evaluate", *words)


def test_bad_text(place, capsys):
    data = place / "bad.jsonl"
    evaluate = ("evaluate", "--model", place / "target", "--data", data)
    data.write_bytes(b'{"text": "fine"}\n{"text": "\xff\xfe"}\n')
    _refused(capsys, "bad.jsonl", *evaluate)
    data.write_text('{"text": "fine"}\n{"text": \n')
    _refused(capsys, "2", *evaluate)
    data.write_text('{"body": "fine"}\n')
    _refused(capsys, "body", *evaluate)
    _refused(capsys, "none.jsonl", *evaluate[:-1], place / "none.jsonl")


def test_empty_and_one_token_documents(place, capsys):
    data = write_jsonl(place / "odd.jsonl", ["", "a", "the cat sat"])
    found = _json(capsys, "evaluate", "--model", place / "target", "--data", data)
    assert found["documents"] == 2
    assert found["bytes"] == 1 + len("the cat sat")
    train = write_jsonl(place / "train.jsonl", ["", "a", *texts(40, seed=6), "b"])
    stages = "prepare,capture,align,fuse,train"
    assert train.is_file()
    _json(capsys, "run", place / "run.yaml", "--stages", stages, "--train.max-steps", "1")


def test_a_hub_name_without_network(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _refused(capsys, "someone/some-model", "evaluate", "--model", "someone/some-model", "--data", place / "train.jsonl")


def test_a_full_disk_is_said_and_leaves_what_stands(place, capsys, monkeypatch):
    _json(capsys, "run", place / "run.yaml", "--stages", "prepare,capture")
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    from fusejax.io import store

    def full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records-00000.tmp")

    monkeypatch.setattr(store.RecordWriter, "_flush", full)
    _refused(capsys, "the disk is full", "align", place / "run.yaml", code=1)
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.undo()
    _json(capsys, "align", place / "run.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory(place, capsys):
    (place / "run").mkdir(mode=0o500)
    _refused(capsys, "cannot write", "prepare", place / "run.yaml")


def test_a_read_only_directory_as_the_system_says_it(place, capsys, monkeypatch):
    from fusejax.stages import context

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place / "run" / "config.yaml"))

    monkeypatch.setattr(context, "save_config", refuse)
    _refused(capsys, "cannot write", "prepare", place / "run.yaml")


def test_a_report_of_an_unfinished_run_says_what_is_missing(place, capsys):
    _call(capsys, "prepare", place / "run.yaml")
    _call(capsys, "report", place / "run")
    assert "Not there yet" in (place / "run" / "report.html").read_text(encoding="utf-8")


def test_verify_needs_something(tmp_path, capsys):
    _refused(capsys, MANIFEST, "verify", tmp_path)


def test_env_says_where_it_runs(capsys):
    found = _json(capsys, "env")
    assert found["packages"]["jax"] == jax.__version__
    assert len(found["devices"]) == jax.device_count()


def test_the_module_is_the_command():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "fusejax", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    from fusejax import __version__

    assert done.stdout.strip() == __version__


def test_evaluate_says_what_it_cannot_use(place, capsys):
    text = place / "text.jsonl"
    text.write_text('{"text": ""}\n')
    words = ("evaluate", "--model", place / "a", "--data", text)
    _refused(capsys, "holds no document with text (1 empty ones)", *words)
    for flag in ("--context", "--batch-tokens", "--limit"):
        _refused(capsys, "no whole number of at least 1", *words, flag, "0")
    text.write_text('{"text": ""}\n{"text": "a cat"}\n')
    assert _json(capsys, *words, "--context", "8", "--batch-tokens", "8")["empty_documents"] == 1


def test_a_file_in_the_place_of_a_directory(place, capsys):
    where = place / "train.jsonl"
    _refused(capsys, "File exists; set `output`", "prepare", place / "run.yaml", "--output", where)
    _refused(capsys, "Not a directory; set `output`", "prepare", place / "run.yaml", "--output", where / "x")
