"""What a merge refuses, and that nothing is left behind; what survives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.stream_write import Staging, TensorWriter, staging_of
from fusejax.stages.merge import command
from fusejax.stages.merge_recipes import flags_to_parameters
from tests.paths import ROOT
from tests.stages.merge_toys import CONFIG, merge_words, read_model, shapes, tokenizer_json, write_family, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def out(tmp_path):
    """Where output would be; nothing may appear beside it."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def refused(words, told, out):
    with pytest.raises(InputError, match=told):
        command("merge", [str(word) for word in words])
    assert os.listdir(out.parent) == []


def changed(models, place, change, *, config=CONFIG):
    tensors = read_model(models[1])
    change(tensors)
    return write_model(place / "changed", tensors, config)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sec",), "Did you mean 'sce'"),
        (("sce", "--selct-topk", "0.5"), "Did you mean 'select_topk'"),
        (("sce", "--weights", "1", "2", "3"), "sce has no parameter 'weights'"),
        (("sce", "--select-topk", "10"), r"select_topk must be finite in \[0, 1\]"),
        (("linear", "--weights", "1", "-1", "0"), "sum to 0"),
        (("linear", "--weights", "1", "2"), "one value for each of the 3 targets"),
        (("ties", "--density", "1.5"), "density"),
        (("sce", "--nonsense",), "no value"),
        (("sce", "--mesh", "fsdp=99"), "mesh"),
        (("sce", "--mesh", "rows=2"), "unknown axes"),
        (("sce", "--threads", "-1"), "threads"),
        (("sce", "--dtype", "int8"), "dtype"),
    ],
)  # fmt: skip
def test_bad_settings(models, out, words, told):
    refused(merge_words(models, out, *words), told, out)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), "has extra"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8]}), r"has shape \(8,\)"),
        (lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:30]}), "vocabularies differ"),
    ],
)  # fmt: skip
def test_structures_that_differ(models, out, tmp_path, change, told):
    other = changed(models, tmp_path, change)
    refused(merge_words([*models, other], out, "sce"), told, out)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.inf, ("sce",)), (np.nan, ("sce", "--mesh", "fsdp=2")), (np.nan, ("linear",)), (np.nan, ("dare_ties",)),
        (np.inf, ("varm", "--granularity", "layer")), (-np.inf, ("ties", "--density", "0.5")),
    ],
)  # fmt: skip
def test_a_value_that_is_not_finite_names_tensor_and_file(models, out, tmp_path, value, words):
    name = "model.layers.1.mlp.down_proj.weight"
    other = changed(models, tmp_path, lambda t: t[name].__setitem__((3, 5), value))
    pattern = rf"(?s){name}.*NaN or infinity.*changed/model.safetensors"
    refused(merge_words([*models[:2], other], out, *words), pattern, out)


def test_the_base_may_stand_in_for_what_is_not_finite(models, out, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    other = changed(models, tmp_path, lambda t: t[name].__setitem__((3, 5), np.nan))
    words = merge_words([*models[:2], other], out, "sce", "--nonfinite", "skip-tensor")
    result = command("merge", words)
    assert list(result.data["skipped"]) == [name]
    assert "1 tensors are the base's" in result.text
    np.testing.assert_array_equal(read_model(out)[name], read_model(models[0])[name])
    assert f"`{name}`" in (out / "README.md").read_text()
    shutil.rmtree(out)
    words = merge_words([other, *models[1:3]], out, "sce", "--nonfinite", "skip-tensor")
    refused(words, "no finite tensor to keep", out)


def test_a_result_beyond_its_dtype(out, tmp_path):
    models = write_family(tmp_path / "f", 2, dtype=np.float16)
    refused(merge_words(models, out, "task_arithmetic", "--scale", "1e8"), "beyond the range of float16", out)


def test_the_same_model_twice(models, out, tmp_path):
    refused(merge_words([*models, models[1]], out, "sce"), "twice", out)
    refused(merge_words([*models, models[1] / ".." / "t1"], out, "sce"), "twice", out)
    shutil.copytree(models[1], tmp_path / "copy")
    refused(merge_words([*models, tmp_path / "copy"], out, "linear"), "the same model is given twice", out)


def test_files_that_are_no_models(models, out, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    refused(merge_words([*models, tmp_path / "pickled"], out, "sce"), "pickled weights", out)
    refused(merge_words([*models, tmp_path / "nowhere"], out, "sce"), "no model directory", out)
    cut = shutil.copytree(models[2], tmp_path / "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(merge_words([*models[:2], cut], out, "sce"), "its header describes", out)


def test_an_output_with_something_in_it(models, out):
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(InputError, match="not an empty directory"):
        command("merge", merge_words(models, out, "sce"))
    assert os.listdir(out) == ["mine"]


def test_what_cannot_be_added_to(models, out, tmp_path):
    done = tmp_path / "done"
    command("merge", merge_words(models, done, "sce"))
    refused(["--into", done, "--targets", models[1], "--out", out], "depend on all targets at once", out)
    refused(["--into", models[0], "--targets", models[1], "--out", out], r"has no merge\.json", out)
    refused(["--into", done, "--out", out], "needs --targets", out)
    refused(["--into", done, "--method", "sce", "--targets", models[1], "--out", out], "leave --recipe", out)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "no valid YAML"),
        ("- 1", "no mapping"),
        ("method: sce\n---\nmethod: sce", "needs a `name`"),
        ("method: sce\nbase: a\ntargets: [b]\nparametres: {}", "unknown key 'parametres'"),
    ],
)
def test_bad_recipes(out, tmp_path, text, told):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    refused(["--recipe", path, "--out", out], told, out)


def test_flags():
    assert flags_to_parameters(["--select-topk=0.5", "--weights", "1", "2e-1"]) == {
        "select_topk": 0.5, "weights": [1, 0.2]
    }  # fmt: skip
    with pytest.raises(InputError, match="do not know what 'x'"):
        flags_to_parameters(["x"])


@pytest.mark.parametrize("tokenizer", ["base", "union", "truncate"])
def test_vocabularies_by_choice(tmp_path, out, tokenizer):
    models = write_family(tmp_path / "f", 1)
    (models[0] / "tokenizer.json").write_text(tokenizer_json([f"t{i}" for i in range(38)]))  # two rows of padding
    tensors = read_model(models[1])
    order = np.r_[5, 3, 0:3, 4, 6:39]  # the target's tokens in another order, and one more
    tensors = {n: x[order] if x.shape[0] == 40 else x for n, x in tensors.items()}
    target = write_model(tmp_path / "target", tensors, CONFIG | {"vocab_size": 39})
    (target / "tokenizer.json").write_text(tokenizer_json([f"t{i}" for i in order]))
    words = merge_words([models[0], target], out, "linear", "--tokenizer", tokenizer)
    if tokenizer == "truncate":
        refused(words, "fewer", out)
        return
    command("merge", words)
    found, base, plain = read_model(out), read_model(models[0]), read_model(models[1])
    embedding, rows = "model.embed_tokens.weight", 39 if tokenizer == "union" else 38
    np.testing.assert_array_equal(found[embedding][:38], plain[embedding][:38])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(found[embedding]) == 40
    tokens = json.loads((out / "tokenizer.json").read_text())
    assert [t["content"] for t in tokens["added_tokens"]] == (["t38"] if tokenizer == "union" else [])
    if tokenizer == "union":
        np.testing.assert_array_equal(found[embedding][38], plain[embedding][38])
    assert base[embedding].shape == (40, 16)
    assert rows <= 40


@pytest.mark.parametrize("after", [0, 9, 20])
def test_a_killed_merge_goes_on_where_it_was(models, out, after, monkeypatch):
    """Killed after some tensors, at a point where one more is half written."""
    words = merge_words(models, out, "sce", "--select-topk", "0.5", "--threads", "1")
    mark, write, written = Staging.mark, TensorWriter.write, []

    def dying(self, name, **facts):
        if len(self.finished) >= after:
            raise KeyboardInterrupt
        mark(self, name, **facts)

    monkeypatch.setattr(Staging, "mark", dying)
    with pytest.raises(KeyboardInterrupt):
        command("merge", words)
    assert not out.exists()
    assert staging_of(out).is_dir()
    monkeypatch.setattr(Staging, "mark", mark)
    monkeypatch.setattr(
        TensorWriter, "write", lambda self, name, *rest: (written.append(name), write(self, name, *rest))
    )
    command("merge", words)
    assert len(set(written)) == len(shapes()) - after
    monkeypatch.setattr(TensorWriter, "write", write)
    again = out.with_name("again")
    command("merge", merge_words(models, again, "sce", "--select-topk", "0.5"))
    for name in ("model.safetensors", "coefficients.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_what_was_damaged_meanwhile_is_made_again(models, out, monkeypatch):
    words = merge_words(models, out, "linear", "--threads", "1")
    finish = TensorWriter.finish
    monkeypatch.setattr(TensorWriter, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command("merge", words)
    monkeypatch.setattr(TensorWriter, "finish", finish)
    file = staging_of(out) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 255
    file.write_bytes(bytes(data))
    command("merge", words)
    again = out.with_name("again")
    command("merge", merge_words(models, again, "linear"))
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


_KEPT_PROGRAMS = {"PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@pytest.mark.once
def test_memory_does_not_grow_with_the_model_and_a_kill_leaves_no_half_model(tmp_path):
    """In a process of its own: 80 MB per model in matrices of 4 MB; then the same, killed by the system."""
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 2048, "num_hidden_layers": 5}
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**21, dtype=np.float32)
    models = []
    for j in range(4):
        tensors = {
            name: (0.02 * pool[: int(np.prod(shape))] + 1e-3 * j * pool[-int(np.prod(shape)) :])
            .astype(ml_dtypes.bfloat16).reshape(shape)
            for name, shape in shapes(config).items()
        }  # fmt: skip
        models.append(write_model(tmp_path / f"m{j}", tensors, config))
    script = (
        "import re, sys, threading, time\n"
        "from fusejax.stages.merge import command\n"
        "anonymous = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "peak, before = [0], None\n"
        "def watch():\n"
        "    while True: peak[0] = max(peak[0], anonymous()); time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "command('merge', sys.argv[1:])\n"
        "print('PEAK', peak[0])\n"
    )
    # Compiled by a first run: what compilers take for themselves is not the merge's, and depends on the machine's load.
    compiled = {f"JAX_{name}": value for name, value in _KEPT_PROGRAMS.items()}
    compiled["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "programs")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | compiled
    call, outputs = [sys.executable, "-c", script], []
    for out in ("first", "out"):
        words = merge_words(models, tmp_path / out, "sce", "--select-topk", "0.1", "--threads", "2")
        found = subprocess.run([*call, *words], env=environment, capture_output=True, text=True, check=True)
        outputs.append((tmp_path / out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    peak = int(found.stdout.split("PEAK ")[1])
    largest = 2 * 1024 * 2048
    assert peak <= 2 * largest * 4 + 200e6
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size > 70e6

    words = merge_words(models, tmp_path / "killed", "sce", "--threads", "1")
    journal = staging_of(tmp_path / "killed") / ".journal"
    for lines in (3, 21):  # the second begins with what the first has finished
        killed = subprocess.Popen([*call, *words], env=environment)
        while killed.poll() is None and not (journal.exists() and journal.read_text().count("\n") > lines):
            pass
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    command("merge", words)
    command("merge", merge_words(models, tmp_path / "whole", "sce"))
    for name in ("model.safetensors", "coefficients.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
