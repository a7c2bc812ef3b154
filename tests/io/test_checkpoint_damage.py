"""Damage of every kind in the steps of a run, and what the writer in the background leaves."""

import errno
import json
import logging
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.cli import main
from fusejax.errors import InputError
from fusejax.io.checkpoint import (
    DamagedCheckpoint,
    StateWriter,
    all_steps,
    damaged_state,
    restore_newest_state,
    restore_train_state,
    save_train_state,
    saved_states,
    tree_checksums,
)
from tests.paths import ROOT

# One leaf: when several reads fail at once, Orbax closes its event loop under those that answer later.
TREE = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 20)), jnp.float32)}
EXTRA = {"loader": {"step": 3}}


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


FLIPPED = """
    import sys
    from pathlib import Path
    import numpy as np
    from fusejax.io.checkpoint import DamagedCheckpoint, restore_train_state, save_train_state
    from tests.io.test_checkpoint_damage import EXTRA, TREE, files_of
    directory, refused = Path(sys.argv[1]), []
    save_train_state(directory, 3, TREE, EXTRA)
    for file in files_of(directory / "3"):
        raw = file.read_bytes()
        for at in (0, len(raw) // 2, len(raw) - 1):
            changed = bytearray(raw)
            changed[at] ^= 1 << (at % 8)
            file.write_bytes(changed)
            try:
                restore_train_state(directory, TREE)
                refused.append(f"{file}: not refused")
            except DamagedCheckpoint:
                refused.append("")
        file.write_bytes(raw)
    state, extra = restore_train_state(directory, TREE)
    assert extra == EXTRA and np.array_equal(state["w"], TREE["w"])
    print(len(refused), *filter(None, refused))
"""


def test_a_flipped_bit_in_any_file_of_a_step_is_refused(tmp_path):
    # In a process of its own: Orbax prints what it thinks of such files, also when nobody listens any more.
    code = textwrap.dedent(FLIPPED)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    count, *wrong = ran.stdout.split(maxsplit=1)
    assert int(count) > 24 and not wrong


SWEPT = """
    import sys
    from pathlib import Path
    import numpy as np
    from fusejax.io.checkpoint import DamagedCheckpoint, checksums, restore_train_state, save_train_state
    from tests.io.test_checkpoint_damage import TREE, files_of
    checksums.LARGE, checksums._ENDS = 1000, 200  # as if the elements' file were too large for a digest of it
    save_train_state(sys.argv[1], 3, TREE)
    (file,) = [path for path in files_of(Path(sys.argv[1])) if path.stat().st_size > 1000]
    raw, accepted = file.read_bytes(), []
    for at in range(0, len(raw), 80):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << (at % 8)]) + raw[at + 1 :])
        try:
            restore_train_state(sys.argv[1], TREE)
            accepted.append(at)
        except DamagedCheckpoint:
            pass
    print(len(raw), *accepted)
"""


def test_a_flipped_bit_anywhere_in_a_large_file_is_refused(tmp_path):
    code = textwrap.dedent(SWEPT)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    size, *accepted = ran.stdout.split()
    assert int(size) > 3000 and not accepted


KILLED = """
    import os, signal, sys
    from fusejax.io.checkpoint import save_train_state, states
    from tests.io.test_checkpoint_damage import EXTRA, TREE
    save_train_state(sys.argv[1], 1, TREE, EXTRA, keep=1)
    states.seal = lambda place: os.kill(os.getpid(), signal.SIGKILL)
    save_train_state(sys.argv[1], 2, TREE, EXTRA, keep=1)
"""


def test_a_kill_between_commit_and_seal_leaves_the_step_before_it(tmp_path, caplog):
    code = textwrap.dedent(KILLED)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == -9, ran.stderr[-2000:]
    assert (tmp_path / "2" / "_CHECKPOINT_METADATA").is_file(), "Orbax has committed it"
    assert all_steps(tmp_path) == [1] and saved_states(tmp_path) == [tmp_path / "1"]
    for file in files_of(tmp_path / "2"):
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    state, extra, step = restore_newest_state(tmp_path, TREE)
    assert (step, extra) == (1, EXTRA)
    np.testing.assert_array_equal(state["w"], TREE["w"])
    with caplog.at_level(logging.WARNING, logger="fusejax"):
        save_train_state(tmp_path, 2, TREE, EXTRA, keep=1)
    assert f"removing {tmp_path / '2'}" in caplog.text and "that was not sealed" in caplog.text
    assert all_steps(tmp_path) == [2] and restore_newest_state(tmp_path, TREE)[2] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_step_that_is_half_removed_is_no_step(tmp_path, monkeypatch):
    save_train_state(tmp_path, 1, TREE, keep=1)
    monkeypatch.setattr("fusejax.io.checkpoint.states.shutil.rmtree", _no_space)
    with pytest.raises(OSError):
        save_train_state(tmp_path, 2, TREE, keep=1)
    assert all_steps(tmp_path) == [2]


def test_a_step_before_the_newest_is_not_saved(tmp_path):
    save_train_state(tmp_path, 5, TREE)
    with pytest.raises(InputError, match="already holds step 5"):
        save_train_state(tmp_path, 4, TREE)


def test_a_damaged_step_is_gone_back_over_only_when_asked(tmp_path, caplog):
    for step in (1, 2, 3):
        save_train_state(tmp_path, step, {"w": TREE["w"] * step}, EXTRA, keep=None)
    for step in (2, 3):
        file = max(files_of(tmp_path / str(step)), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-30] + bytes(30))
    with pytest.raises(DamagedCheckpoint):
        restore_newest_state(tmp_path, TREE)
    assert all_steps(tmp_path) == [1, 2, 3]
    with caplog.at_level(logging.ERROR, logger="fusejax"):
        state, _, step = restore_newest_state(tmp_path, TREE, on_damaged="previous")
    assert step == 1
    np.testing.assert_array_equal(state["w"], TREE["w"])
    assert "GOING BACK to step 2" in caplog.text and "GOING BACK to step 1" in caplog.text
    assert all_steps(tmp_path) == [1] and (tmp_path / "3.damaged").is_dir()
    save_train_state(tmp_path, 3, TREE, EXTRA, keep=None)  # its place is free again
    assert restore_newest_state(tmp_path, TREE)[2] == 3
    file = max(files_of(tmp_path / "1"), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DamagedCheckpoint):  # there is none before it
        restore_newest_state(tmp_path, TREE, step=1, on_damaged="previous")


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.tree.map(jnp.copy, TREE | {"large": jnp.zeros((500, 500))})
    with StateWriter(tmp_path, keep=None) as writer:
        for step in (1, 2, 3):
            state = add(state)
            writer.save(step, state)
            state = add(state)  # in the same memory
            writer.check()
    for step in (1, 2, 3):
        found, _ = restore_train_state(tmp_path, state, step=step)
        np.testing.assert_array_equal(found["large"], np.full((500, 500), 2 * step - 1))


def test_a_failure_in_the_background_is_raised_once_and_the_next_save_works(tmp_path, monkeypatch):
    with StateWriter(tmp_path) as writer:
        writer.save(1, TREE)
        writer.wait()
        commit = writer._commit
        monkeypatch.setattr(writer, "_commit", lambda: (commit(), _no_space()))
        writer.save(2, TREE)
        with pytest.raises(OSError, match="intact; make room and go on") as caught:
            while True:
                writer.check()
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        writer.check()
        writer.save(3, TREE)
    assert all_steps(tmp_path)[-1] == 3


def _no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_audit_names_what_is_damaged_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusejax.io.checkpoint.audit.LARGE", 100)  # as if the elements' file were too large
    monkeypatch.setattr("fusejax.io.checkpoint.checksums.LARGE", 1000)
    monkeypatch.setattr("fusejax.io.checkpoint.checksums._ENDS", 100)
    directory = tmp_path / "train" / "arm" / "checkpoints"
    for step in (2, 4):
        save_train_state(directory, step, {"layer": TREE | {"count": jnp.int32(step)}}, EXTRA)
    assert saved_states(tmp_path) == [directory / "2", directory / "4"]
    assert not any(map(damaged_state, saved_states(tmp_path)))
    assert main(["verify", str(tmp_path)]) == 0
    assert "0 artefacts, 2 train states, all good" in capsys.readouterr().out
    elements = max(files_of(directory / "4"), key=lambda path: path.stat().st_size)
    raw = bytearray(elements.read_bytes())
    raw[len(raw) // 2] ^= 1
    elements.write_bytes(raw)
    assert main(["verify", str(tmp_path), "--json"]) == 2
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert bad.startswith(str(directory / "4" / "layer.w"))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.bool_, np.float64])
@pytest.mark.parametrize("shape", [(3, 5, 4), (), (0, 4), (29,)])
def test_checksums_of_host_arrays_do_not_depend_on_blocks(monkeypatch, dtype, shape):
    array = np.asarray(5 * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    whole = tree_checksums({"x": array})
    monkeypatch.setattr("fusejax.io.checkpoint.checksums._BLOCK", 7)
    assert tree_checksums({"x": array}) == whole
    if array.dtype.itemsize < 8:  # a device has no float64 here
        assert tree_checksums({"x": jnp.asarray(array)}) == whole
