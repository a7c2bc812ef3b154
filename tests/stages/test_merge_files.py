"""`fusejax merge` over files: what it writes, and that it equals the pure functions on the same tensors."""

import json

import ml_dtypes
import numpy as np
import pytest

from fusejax.io.hf import load_hf_model
from fusejax.merging import merge_leaf
from fusejax.merging.recipe import parse_recipe
from fusejax.stages.merge import command
from fusejax.stages.merge_files import Options, opened_job, perform
from fusejax.stages.merge_recipes import read_recipes
from tests.paths import ROOT
from tests.stages.merge_toys import CONFIG, merge_words, read_model, tokenizer_json, write_family


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    found = write_family(root)
    for name, text in {"tokenizer.json": tokenizer_json(list("abcd")), "chat_template.jinja": "{{ x }}"}.items():
        (found[0] / name).write_text(text)
    (found[0] / "generation_config.json").write_text('{"top_p": 0.5}')
    return found


def run(*words):
    return command("merge", [str(word) for word in words]).data


def expected(models, method, params, *, dtype=ml_dtypes.bfloat16):
    base, *targets = [read_model(path) for path in models]
    return {
        name: merge_leaf(name, base[name], [t[name] for t in targets], method=method, params=params, dtype=dtype)
        for name in base
    }


def assert_same(found, wanted, *, steps=1):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        off = found[name].view(f"i{tensor.itemsize}").astype(np.int64) - tensor.view(f"i{tensor.itemsize}")
        assert np.abs(off).max() <= steps, name


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("sce", {}), ("sce", {"select_topk": 0.2}), ("linear", {"weights": [1, 2, 3]}), ("varm", {}),
        ("ties", {"density": 0.4}), ("dare_ties", {"density": 0.5, "seed": 3}),
    ],
)  # fmt: skip
def test_files_equal_the_pure_functions(models, tmp_path, method, params):
    flags = [w for k, v in params.items() for w in (f"--{k}", *(v if isinstance(v, list) else [v]))]
    run(*merge_words(models, tmp_path / "out", method, *flags))
    assert_same(read_model(tmp_path / "out"), expected(models, method, params))
    load_hf_model(tmp_path / "out")


def test_what_lies_beside_the_weights(models, tmp_path):
    found = run(*merge_words(models, tmp_path / "out", "sce"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json",
        "README.md", "merge.json", "coefficients.json", "coefficients.png",
    }  # fmt: skip
    coefficients = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    assert set(coefficients) == set(read_model(models[0]))
    assert all(abs(sum(factors) - 1) < 1e-6 and len(factors) == 3 for factors in coefficients.values())
    assert np.mean([c[2] for c in coefficients.values()]) > np.mean([c[0] for c in coefficients.values()])
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["inputs"][str(models[1])]["xxh3"] == found["targets"][str(models[1])]
    assert found["targets"][str(models[1])] in card
    assert "method: sce" in card
    assert (tmp_path / "out" / "coefficients.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "out").stat().st_mode & 0o777 == (models[0].stat().st_mode & 0o777)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_threads_and_shards_change_nothing(models, tmp_path):
    for threads in (1, 3):
        run(*merge_words(models, tmp_path / str(threads), "sce", "--select-topk", "0.3", "--threads", threads))
    one, three = ((tmp_path / n / "model.safetensors").read_bytes() for n in "13")
    assert one == three


def test_checkpoints_go_in_and_come_out(models, tmp_path):
    from fusejax.io.checkpoint import load_model_params, save_model
    from fusejax.io.manifest import verify_directory

    _, params = load_hf_model(models[1])
    save_model(tmp_path / "t1", params, CONFIG)
    mixed = [models[0], tmp_path / "t1", *models[2:]]
    run(*merge_words(mixed, tmp_path / "out", "sce", "--format", "checkpoint"))
    run(*merge_words(models, tmp_path / "hf", "sce"))
    assert verify_directory(tmp_path / "out") == []
    merged = load_model_params(tmp_path / "out")
    _, wanted = load_hf_model(tmp_path / "hf")
    np.testing.assert_array_equal(merged["layers"]["mlp"]["up"]["kernel"], wanted["layers"]["mlp"]["up"]["kernel"])
    assert_same(read_model(tmp_path / "out"), read_model(tmp_path / "hf"), steps=0)
    assert {p.name for p in tmp_path.iterdir()} == {"t1", "out", "hf"}


def test_a_mesh_gives_the_same_model(models, tmp_path):
    flags = ["--select-topk", "0.3"]
    run(*merge_words(models, tmp_path / "mesh", "sce", *flags, "--mesh", "data=1,fsdp=4,tensor=2"))
    run(*merge_words(models, tmp_path / "host", "sce", *flags))
    assert_same(read_model(tmp_path / "mesh"), read_model(tmp_path / "host"))
    records = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("mesh", "host")]
    assert records[0]["inputs"] == records[1]["inputs"]
    assert all(facts["tensors"] for facts in records[0]["inputs"].values())


def test_layers_and_modules_are_weighed_together(models, tmp_path):
    run(*merge_words(models, tmp_path / "out", "varm", "--granularity", "layer"))
    coefficients = json.loads((tmp_path / "out" / "coefficients.json").read_text())
    first = {tuple(c) for name, c in coefficients.items() if name.startswith("model.layers.0.")}
    second = {tuple(c) for name, c in coefficients.items() if name.startswith("model.layers.1.")}
    assert len(first) == len(second) == 1
    base, *targets = [read_model(path) for path in models]
    names = [name for name in base if name.startswith("model.layers.0.")]
    energy = [sum(float(((t[n].astype(np.float64) - base[n]) ** 2).sum()) for n in names) for t in targets]
    np.testing.assert_allclose(first.pop(), np.array(energy) / sum(energy), rtol=1e-5)


def test_a_recipe_of_mergekit_with_gradients_and_filters(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"""
merge_method: slerp
base_model: {models[0]}
models: [{{model: {models[0]}}}, {{model: {models[1]}}}]
parameters:
  t:
    - {{filter: mlp, value: [0.0, 1.0]}}
    - {{value: 0.5}}
dtype: float32
out_dtype: bfloat16
"""
    )
    run("--recipe", recipe, "--out", tmp_path / "out")
    found, base, target = (read_model(p) for p in (tmp_path / "out", models[0], models[1]))
    name = "model.layers.{}.mlp.up_proj.weight".format
    np.testing.assert_array_equal(found[name(0)], base[name(0)])
    np.testing.assert_array_equal(found[name(1)], target[name(1)])
    half = merge_leaf("x", base["model.norm.weight"], [target["model.norm.weight"]], method="slerp", params={"t": 0.5})
    assert_same({"x": found["model.norm.weight"]}, {"x": half})


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "merge").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_fusechat_run(models, tmp_path, path):
    (read,) = read_recipes(path)
    listed = parse_recipe(read)
    names = dict.fromkeys([listed.base, *(s.model for piece in listed.slices for s in piece.sources)])
    family = write_family(tmp_path, len(names) - 1)
    places = dict(zip((name for name in names if name), family, strict=True))
    with opened_job(read, places) as job:
        record = perform(job, tmp_path / "out", Options(threads=1))
    assert record["tensors"] == len(read_model(family[0]))
    load_hf_model(tmp_path / "out")


def test_slices_change_the_number_of_layers(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    pieces = "".join(f"\n  - sources: [{{model: {models[j]}, layer_range: [{j - 1}, 2]}}]" for j in (1, 2))
    recipe.write_text(f"merge_method: passthrough\nslices:{pieces}\n")
    run("--recipe", recipe, "--out", tmp_path / "out")
    config, _ = load_hf_model(tmp_path / "out")
    assert config.num_layers == 3
    np.testing.assert_array_equal(
        read_model(tmp_path / "out")["model.layers.2.mlp.up_proj.weight"],
        read_model(models[2])["model.layers.1.mlp.up_proj.weight"],
    )


def test_dtypes(models, tmp_path):
    run(*merge_words(models, tmp_path / "out", "sce", "--dtype", "float32"))
    assert_same(read_model(tmp_path / "out"), expected(models, "sce", {}, dtype=np.float32), steps=300)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    mixed = [models[0], tmp_path / "out"]
    run(*merge_words(mixed, tmp_path / "mixed", "linear"))
    assert {str(x.dtype) for x in read_model(tmp_path / "mixed").values()} == {"float32"}


@pytest.mark.parametrize(("method", "flags"), [("linear", []), ("task_arithmetic", ["--scale", "0.5"])])
def test_one_more_target_without_the_others(models, tmp_path, method, flags):
    run(*merge_words(models[:3], tmp_path / "two", method, *flags, "--weights", 1, 2))
    run("--into", tmp_path / "two", "--targets", models[3], "--weights", 3, "--out", tmp_path / "three")
    run(*merge_words(models, tmp_path / "all", method, *flags, "--weights", 1, 2, 3))
    found, wanted = read_model(tmp_path / "three"), read_model(tmp_path / "all")
    for name, tensor in wanted.items():
        step = np.abs(tensor.astype(np.float32)).max() * 2.0**-7
        assert np.abs(found[name].astype(np.float32) - tensor.astype(np.float32)).max() <= step


def test_several_stages(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    first = f"name: pair\nmethod: linear\nbase: {models[0]}\ntargets: [{models[1]}, {models[2]}]\n"
    recipe.write_text(first + f"---\nmethod: sce\nbase: {models[0]}\ntargets: [pair, {models[3]}]\n")
    run("--recipe", recipe, "--out", tmp_path / "out")
    run(*merge_words(models[:3], tmp_path / "pair", "linear"))
    run(*merge_words([models[0], tmp_path / "pair", models[3]], tmp_path / "both", "sce"))
    assert_same(read_model(tmp_path / "out"), read_model(tmp_path / "both"), steps=0)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "out", "pair", "both"}


def test_explain_says_what_would_be_done(models, tmp_path):
    result = command("merge", merge_words(models, tmp_path / "out", "sce", "--dtype", "float32", "--explain"))
    found = result.data
    size = sum(x.size for x in read_model(models[0]).values())
    assert (found["parameters"], found["bytes_to_write"]) == (size, size * 4)
    assert found["bytes_to_read"] == 2 * 4 * 2 * size  # a look with the statistics, and the result, over four models
    assert found["dtype_changes"] == ["bfloat16 -> float32"]
    assert "squared changes" in found["coefficients"]
    assert "nothing has been read but headers" in result.text
    assert list(tmp_path.iterdir()) == []


def test_tied_embeddings_stay_tied(tmp_path):
    tied = write_family(tmp_path, 2, config=CONFIG | {"tie_word_embeddings": True})
    found = command("merge", merge_words(tied, tmp_path / "out", "sce", "--explain")).data
    assert found["tied"] == ["model.embed_tokens.weight"]
    run(*merge_words(tied, tmp_path / "out", "sce"))
    config, params = load_hf_model(tmp_path / "out")
    assert config.tie_embeddings
    assert "head" not in params


def test_transformers_computes_the_same_logits(models, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import jax
    import jax.numpy as jnp

    from fusejax.models import logits

    run(*merge_words(models, tmp_path / "out", "sce", "--dtype", "float32"))
    (tmp_path / "out" / "tokenizer.json").unlink()  # it is no real tokenizer
    (tmp_path / "out" / "generation_config.json").unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (2, 9))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    config, params = load_hf_model(tmp_path / "out", dtype="float32")
    params = jax.tree.map(jnp.asarray, params)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)
    found = logits(params, config, jnp.asarray(tokens), positions, jnp.ones_like(positions))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
