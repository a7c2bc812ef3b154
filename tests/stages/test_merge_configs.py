"""What the inputs' configurations say: refused, noted or carried over; heads that only some models have."""

import json

import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.stages.merge import command
from tests.stages.merge_toys import CONFIG, merge_words, read_model, write_family, write_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"), 2)


def with_config(models, place, **changes):
    return write_model(place / "changed", read_model(models[1]), CONFIG | changes)


def test_models_with_other_heads_are_refused(models, tmp_path):
    other = with_config(models, tmp_path, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"num_attention_heads is 4 in .*base and 2 in .*changed"):
        command("merge", merge_words([models[0], other], tmp_path / "out", "linear"))
    assert not (tmp_path / "out").exists()


def test_other_positions_are_noted(models, tmp_path):
    other = with_config(models, tmp_path, rope_theta=5e5)
    words = merge_words([models[0], models[2], other], tmp_path / "out", "linear")
    assert "rope_theta is 10000.0" in command("merge", [*words, "--explain"]).text
    found = command("merge", words)
    assert "rope_theta is 10000.0" in found.text
    assert "rope_theta is 10000.0" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 10000.0


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_config_is_named(models, tmp_path, text):
    other = with_config(models, tmp_path)
    (other / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"changed/config\.json"):
        command("merge", merge_words([models[0], other], tmp_path / "out", "linear"))


@pytest.mark.parametrize("tied", [0, 1])
def test_a_head_that_one_model_has(models, tmp_path, tied):
    """The tied model's embeddings stand in for its head, and the output has a head of its own."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tensors = [read_model(path) for path in models[:2]]
    del tensors[tied][HEAD]
    ties = [CONFIG | {"tie_word_embeddings": j == tied} for j in range(2)]
    family = [write_model(tmp_path / f"m{j}", t, c) for j, (t, c) in enumerate(zip(tensors, ties, strict=True))]
    command("merge", merge_words(family, tmp_path / "out", "task_arithmetic", "--weights", "0.5"))
    found = read_model(tmp_path / "out")
    head, embedding = ((tensors[j].get(HEAD, tensors[j][EMBEDDING]).astype(np.float32)) for j in range(2))
    np.testing.assert_allclose(found[HEAD].astype(np.float32), head + 0.5 * (embedding - head), rtol=2**-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    np.testing.assert_array_equal(loaded.lm_head.weight.float().detach(), found[HEAD].astype(np.float32))
    np.testing.assert_array_equal(
        loaded.model.embed_tokens.weight.float().detach(), found[EMBEDDING].astype(np.float32)
    )


def test_stages_are_explained_before_any_exists(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    first = f"name: pair\nmethod: linear\nbase: {models[0]}\ntargets: [{models[1]}, {models[2]}]\ndtype: float32\n"
    recipe.write_text(first + f"---\nmethod: sce\nbase: {models[0]}\ntargets: [pair, {models[2]}]\n")
    found = command("merge", ["--recipe", str(recipe), "--out", str(tmp_path / "out"), "--explain"])
    pair, last = found.data["stages"]
    assert (pair["name"], pair["method"], last["method"]) == ("pair", "linear", "sce")
    assert last["dtype_changes"] == ["bfloat16 -> float32"]  # the pair is float32, so the result is
    assert "stage pair, linear" in found.text
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


def test_a_recipe_of_bytes(tmp_path):
    (tmp_path / "recipe.yml").write_bytes(b"\x80\xff\x00")
    with pytest.raises(InputError, match="no valid YAML"):
        command("merge", ["--recipe", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="neither a number nor a word"):
        command("merge", ["--method", "linear", "--targets", "x", "--out", str(tmp_path / "out"), "--weights", "[1"])
