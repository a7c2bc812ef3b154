"""Model directories: bit-exact round trips, and every kind of damage refused with its file and its remedy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model, read_hf_config, save_hf_model
from fusejax.models import ModelConfig, param_table
from fusejax.parallel import flatten_paths, unflatten_paths
from tests.paths import DATA, needs_data

CFG = ModelConfig(64, 32, 48, 2, 4, 2, architecture="mistral", sliding_window=9, eos_id=(2, 3))
DOWN = "model.layers.1.mlp.down_proj.weight"
INDEX = "model.safetensors.index.json"


def params_of(cfg: ModelConfig = CFG, dtype=np.float32):
    rng = np.random.default_rng(0)
    table = param_table(cfg)
    return unflatten_paths({path: rng.normal(size=spec.shape).astype(dtype) for path, spec in table.items()})


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_hf_model(tmp_path / "model", CFG, params_of())
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_hf_model(tmp_path / "sharded", CFG, params_of(), max_shard_bytes=20_000)
    return tmp_path / "sharded"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype, max_shard_bytes) -> None:
    params = params_of(dtype=dtype)
    save_hf_model(tmp_path / "a", CFG, params, max_shard_bytes=max_shard_bytes)
    cfg, again = load_hf_model(tmp_path / "a")
    assert replace(cfg, dtype="float32") == CFG
    flat, flat_again = flatten_paths(params), flatten_paths(again)
    assert set(flat) == set(flat_again)
    assert all(flat[p].dtype == flat_again[p].dtype and bits(flat[p]) == bits(flat_again[p]) for p in flat)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 20_000)
    assert all(f.stat().st_size < 22_000 for f in files) or len(files) == 1
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name


@needs_data
@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_the_export_of_an_import_is_the_same_file_content(tmp_path: Path, name: str) -> None:
    source = DATA / "models" / name
    cfg, params = load_hf_model(source)
    save_hf_model(tmp_path / name, cfg, params, tokenizer_dir=source, card="# A model\n")
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / name))
    assert set(before) == set(after)
    assert all(before[n].shape == after[n].shape and bits(before[n]) == bits(after[n]) for n in before)
    assert (tmp_path / name / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_hf_config(tmp_path / name) == cfg
    assert (tmp_path / name / "README.md").read_text() == "# A model\n"


def test_weights_are_converted_on_request(saved: Path) -> None:
    cfg, params = load_hf_model(saved, dtype="bfloat16")
    assert cfg.dtype == "bfloat16" and params["head"]["kernel"].dtype == ml_dtypes.bfloat16
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        load_hf_model(saved, dtype="int8")


def test_all_misfits_are_reported_at_once_with_their_file(saved: Path) -> None:
    def damage(tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.9.extra"] = np.ones(3, np.float32)
        tensors[DOWN] = tensors[DOWN][:, :-1].copy()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-4].copy()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # harmless, old

    edit_weights(saved, damage)
    with pytest.raises(InputError) as error:
        load_hf_model(saved)
    text = str(error.value)
    assert str(saved) in text and "missing: model.norm.weight (32,)" in text
    assert f"model.safetensors: {DOWN} has shape (32, 47), expected (32, 48)" in text
    assert "has shape (60, 32), expected (64, 32) (vocab_size of config.json is 64)" in text
    assert "model.layers.9.extra is not part of this architecture" in text and "dtype I32" in text
    assert "inv_freq" not in text


def test_weights_that_are_not_finite_are_named(saved: Path) -> None:
    def damage(tensors) -> None:
        tensors[DOWN][3, 4] = np.nan
        tensors["model.norm.weight"][0] = np.inf

    edit_weights(saved, damage)
    with pytest.raises(InputError, match="NaN or infinity") as error:
        load_hf_model(saved)
    assert DOWN in str(error.value) and "model.norm.weight" in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -7])
def test_a_truncated_file_is_refused(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated"):
        load_hf_model(saved)


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "pickle.bin"])
def test_an_index_cannot_lead_elsewhere(sharded: Path, saved: Path, name: str) -> None:
    (sharded / "pickle.bin").write_bytes(b"pickle")
    index = json.loads((sharded / INDEX).read_text())
    edit_json(sharded / INDEX, weight_map=index["weight_map"] | {DOWN: name})
    with pytest.raises(InputError, match=r"out of the directory|pickled"):
        load_hf_model(sharded)


def test_links_out_of_the_directory_are_refused(saved: Path, sharded: Path) -> None:
    shard = next(sharded.glob("*.safetensors"))
    shutil.move(shard, sharded.parent / "elsewhere.safetensors")
    shard.symlink_to(sharded.parent / "elsewhere.safetensors")
    with pytest.raises(InputError, match="link out of its directory"):
        load_hf_model(sharded)
    shard.unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_hf_model(sharded)


def test_pickles_are_refused_with_how_to_convert(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_hf_model(saved)
    (saved / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_hf_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"model_type": "bert"}'])
def test_a_broken_config_names_its_file(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf_model(saved)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    tied = replace(CFG, tie_embeddings=True)
    save_hf_model(tmp_path / "m", tied, params_of(tied))
    edit_weights(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "head" not in load_hf_model(tmp_path / "m")[1]
    edit_weights(tmp_path / "m", lambda t: t["lm_head.weight"].__setitem__((0, 0), 7.0))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        load_hf_model(tmp_path / "m")


def test_an_untied_model_without_a_head_says_how_to_mend(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match="set tie_word_embeddings"):
        load_hf_model(saved)


def test_a_target_with_something_in_it_is_left_alone(saved: Path) -> None:
    before = (saved / "model.safetensors").stat()
    with pytest.raises(InputError, match="not empty"):
        save_hf_model(saved, CFG, params_of())
    assert (saved / "model.safetensors").stat() == before


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither tokenizer\.json"):
        save_hf_model(tmp_path / "m", CFG, params_of(), tokenizer_dir=tmp_path / "empty")

    def full(*_args, **_options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusejax.io.hf.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_hf_model(tmp_path / "m", CFG, params_of())
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_parameters_of_another_model_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"embed\.embedding is \(64, 32\), expected \(65, 32\)"):
        save_hf_model(tmp_path / "m", replace(CFG, vocab_size=65), params_of())
    with pytest.raises(InputError, match="dtype int32"):
        save_hf_model(tmp_path / "m", CFG, params_of(dtype=np.int32))
    assert not list(tmp_path.iterdir())
