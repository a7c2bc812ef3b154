import errno
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.errors import InputError
from fusejax.io.checkpoint import (
    all_steps,
    latest_step,
    load_model_params,
    remove_orphans,
    restore_train_state,
    save_model,
    save_train_state,
    tree_checksums,
)
from fusejax.types import TrainState


def state(seed=0) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"embedding": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)},
    }
    opt = ({"count": jnp.int32(3)}, jax.tree.map(lambda x: x.astype(jnp.float32) + 1, params), ())
    return TrainState(jnp.int32(7), params, opt)


def mesh_of(count: int, kind=AxisType.Auto):
    shape = {1: (1, 1), 4: (4, 1), 8: (2, 4)}[count]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(kind,) * 2, devices=jax.devices()[:count])


def place(tree, count, kind=AxisType.Auto, *, abstract=False):
    mesh = mesh_of(count, kind)

    def one(x):
        sharding = NamedSharding(mesh, P("data", "fsdp") if x.ndim == 2 else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if abstract else jax.device_put(x, sharding)

    return jax.tree.map(one, tree)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def data_files(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("d/*") if p.is_file()]


def test_saved_on_eight_devices_restored_on_one_and_four(tmp_path):
    original = state()
    save_train_state(tmp_path, 7, place(original, 8), {"loader": {"step": 7}})
    for count in (1, 4, 8):
        restored, extra = restore_train_state(tmp_path, place(original, count, abstract=True))
        same(restored, original)
        assert extra == {"loader": {"step": 7}}
        assert len(restored.params["head"]["kernel"].sharding.device_set) == count
    explicit, _ = restore_train_state(tmp_path, place(original, 8, AxisType.Explicit, abstract=True))
    same(explicit, original)
    same(restore_train_state(tmp_path, jax.eval_shape(state))[0], original)


def test_steps_are_listed_and_the_newest_are_kept(tmp_path):
    assert all_steps(tmp_path / "none") == [] and latest_step(tmp_path) is None
    for step in (2, 10, 30):
        save_train_state(tmp_path, step, state(step), keep=2)
    assert all_steps(tmp_path) == [10, 30] and latest_step(tmp_path) == 30
    same(restore_train_state(tmp_path, state(), step=10)[0], state(10))
    with pytest.raises(InputError, match=r"step 2 .*\[10, 30\]"):
        restore_train_state(tmp_path, state(), step=2)
    with pytest.raises(InputError, match="already holds step 30"):
        save_train_state(tmp_path, 30, state())
    with pytest.raises(InputError, match="no checkpoint"):
        restore_train_state(tmp_path / "none", state())


def test_checksums_do_not_depend_on_the_sharding_and_see_every_bit():
    original = state()
    expected = tree_checksums(original)
    assert expected == tree_checksums(jax.tree.map(np.asarray, original))
    for count, kind in [(1, AxisType.Auto), (4, AxisType.Auto), (8, AxisType.Auto), (8, AxisType.Explicit)]:
        assert tree_checksums(place(original, count, kind)) == expected
    for dtype in (np.float64, np.int64, np.float32, np.float16, np.int8, bool):
        x = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
        base = tree_checksums({"x": x})
        flipped = x.copy()
        flipped.view(np.uint8)[1, 0] ^= 1
        assert tree_checksums({"x": flipped}) != base
        assert tree_checksums({"x": x[::-1]}) != base  # the same elements elsewhere


def test_a_flipped_bit_is_refused_and_the_leaf_is_named(tmp_path):
    # Incompressible data of one large leaf: most bytes of the largest file are its elements.
    tree = {"small": jnp.ones(3), "large": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=50_000))}}
    save_train_state(tmp_path, 1, tree)
    file = max(data_files(tmp_path), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"damaged.*large\.kernel") as caught:
        restore_train_state(tmp_path, tree)
    assert "small" not in str(caught.value)


def test_a_missing_file_is_refused_in_few_words(tmp_path):
    # One leaf: when several reads fail at once, Orbax closes its event loop under those that answer later.
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=50_000))}
    save_train_state(tmp_path, 1, tree)
    for file in data_files(tmp_path):
        file.unlink()
    with pytest.raises(InputError, match="cannot be read") as caught:
        restore_train_state(tmp_path, tree)
    assert len(str(caught.value)) < 800


def test_other_shapes_dtypes_and_leaves_are_all_listed(tmp_path):
    save_train_state(tmp_path, 1, {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(1)})
    with pytest.raises(InputError) as caught:
        restore_train_state(tmp_path, {"a": jnp.ones((3, 2)), "b": jnp.ones(4, jnp.bfloat16), "d": jnp.ones(1)})
    text = str(caught.value)
    for part in ("a: saved float32[2, 3], expected float32[3, 2]", "expected bfloat16[4]", "c: in the", "d: not in"):
        assert part in text


KILLED = """
    import os, signal, sys, threading, time
    import jax.numpy as jnp
    import numpy as np
    from fusejax.io.checkpoint import save_train_state
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)))}
    save_train_state(sys.argv[1], 1, tree)
    def watch():
        while not any("2.orbax" in name for name in os.listdir(sys.argv[1])):
            time.sleep(0.0001)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()
    save_train_state(sys.argv[1], 2, tree)
    time.sleep(5)
"""


def test_a_killed_save_leaves_the_previous_step(tmp_path, caplog):
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)))}
    step = latest_step(tmp_path)
    assert step in (1, 2)  # the kill may come just after the commit
    same(restore_train_state(tmp_path, tree)[0], tree)
    orphan = tmp_path / "5.orbax-checkpoint-tmp"
    (orphan / "state").mkdir(parents=True)
    assert latest_step(tmp_path) == step
    with caplog.at_level(logging.WARNING, logger="fusejax"):
        save_train_state(tmp_path, 3, tree)
    assert "5.orbax-checkpoint-tmp" in caplog.text
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]
    assert remove_orphans(tmp_path) == []


def config():
    return {"model_type": "llama", "hidden_size": 8}


def test_model_directory_roundtrip(tmp_path):
    params = state().params
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "model.safetensors").write_text("not to be copied")
    save_model(tmp_path / "model", place(params, 8), config(), tokenizer_dir=tokenizer)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "checksums.json",
        "config.json",
        "params",
        "tokenizer.json",
    ]
    loaded = load_model_params(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config()
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded))
    same(loaded, params)
    shardings = jax.tree.map(lambda x: x.sharding, place(params, 4))
    sharded = load_model_params(tmp_path / "model", shardings=shardings)
    same(sharded, params)
    assert sharded["head"]["kernel"].sharding == shardings["head"]["kernel"]
    save_model(tmp_path / "model", loaded, config() | {"hidden_size": 9})
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"] == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tokenizer"]


def test_model_directory_errors(tmp_path):
    params = {"head": {"kernel": np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)}}
    with pytest.raises(InputError, match=r"no checksums\.json"):
        load_model_params(tmp_path)
    save_model(tmp_path / "m", params, config())
    with pytest.raises(InputError, match="no tokenizer file"):
        save_model(tmp_path / "m", params, config(), tokenizer_dir=tmp_path)
    same(load_model_params(tmp_path / "m"), params)  # the earlier one is intact
    with pytest.raises(InputError, match="other leaves"):
        load_model_params(tmp_path / "m", shardings={"x": None})
    file = max(data_files(tmp_path / "m"), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"head\.kernel"):
        load_model_params(tmp_path / "m")
    record = json.loads((tmp_path / "m" / "checksums.json").read_text())
    assert record["leaves"]["head.kernel"]["shape"] == [200, 100]
    shutil.rmtree(tmp_path / "m" / "params")
    with pytest.raises(InputError, match="cannot be read"):
        load_model_params(tmp_path / "m")


def test_a_directory_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_train_state(tmp_path / "file" / "run", 1, state())
    with pytest.raises(InputError, match="cannot write"):
        save_model(tmp_path / "file" / "model", state().params, config())


FULL = """
    import resource, signal, sys
    import numpy as np
    from fusejax.io.checkpoint import save_model, save_train_state
    tree = {"w": np.random.default_rng(0).normal(size=(300, 300))}
    save_train_state(sys.argv[1] + "/run", 1, tree)
    save_model(sys.argv[1] + "/model", tree, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    second = lambda: save_train_state(sys.argv[1] + "/run", 2, tree)
    for save in (second, lambda: save_model(sys.argv[1] + "/model", tree, {})):
        try:
            save()
        except OSError as error:
            print(error.errno, error)
"""


def test_a_write_that_fails_is_told_and_leaves_what_was_there(tmp_path):
    # A limit on the size of files stands for a full disk: both come back from the same write.
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and all(x.startswith(f"{errno.EFBIG} ") and "cannot write" in x for x in lines)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run"]
    tree = {"w": np.random.default_rng(0).normal(size=(300, 300))}
    np.testing.assert_array_equal(load_model_params(tmp_path / "model")["w"], tree["w"])


def test_loggers_keep_their_levels_and_nothing_is_printed(tmp_path, capfd):
    before = {name: logging.getLogger(name).level for name in ("absl", "orbax", "")}
    save_train_state(tmp_path, 1, state())
    restore_train_state(tmp_path, state())
    assert {name: logging.getLogger(name).level for name in before} == before
    assert capfd.readouterr() == ("", "")
