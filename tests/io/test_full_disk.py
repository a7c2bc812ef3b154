"""A disk that is really full: a file system of a megabyte, in a namespace of the test's own."""

import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.paths import ROOT

MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1"'
FILL = """
    import errno, os, subprocess, sys
    from pathlib import Path
    import numpy as np
    from fusejax.io.checkpoint import all_steps, restore_train_state, save_train_state
    from fusejax.io.store import Record, RecordReader, RecordWriter

    disk = Path(sys.argv[1])
    noise = np.random.default_rng(0).normal
    tree = {"w": noise(size=(300, 300)).astype(np.float32)}  # 360 kB that cannot be compressed

    def full(act):
        try:
            act()
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return str(error)
        raise AssertionError("there was room")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    save_train_state(disk / "run", 1, tree)
    (disk / "other").write_bytes(os.urandom(500_000))
    print(full(lambda: save_train_state(disk / "run", 2, tree)))
    assert [path.name for path in (disk / "run").iterdir()] == ["1"]

    records = [Record(str(n), {"n_bytes": 1}, {"tokens": np.arange(n), "x": noise(size=20_000)}) for n in range(4)]
    identity = {"kind": "captured", "settings": {}, "shard_size": 1}

    def write():
        writer = RecordWriter(disk / "store", **identity)
        for number in range(writer.resume_at, 4):
            writer.write(records[number])
        writer.finish()

    full(write)
    resize("8m")
    kept = len(list((disk / "store").glob("*.array_record")))
    write()
    reader = RecordReader(disk / "store", kind="captured")
    for found, expected in zip(reader, records, strict=True):
        np.testing.assert_array_equal(found.arrays["x"], expected.arrays["x"])
    save_train_state(disk / "run", 2, tree)
    for step in all_steps(disk / "run"):
        np.testing.assert_array_equal(restore_train_state(disk / "run", tree, step=step)[0]["w"], tree["w"])
    print(all_steps(disk / "run"), kept)
"""


def test_a_full_disk_is_told_keeps_what_is_there_and_is_gone_on_from(tmp_path):
    unshared = ["unshare", "-rm", "sh", "-ec"]
    able = (
        shutil.which("unshare")
        and not subprocess.run([*unshared, MOUNT, "sh", tmp_path], capture_output=True).returncode
    )
    if not able:
        pytest.skip("no file system may be mounted here, not even in a namespace of one's own")
    script = MOUNT + '; shift; exec "$@"'
    command = [*unshared, script, "sh", tmp_path, sys.executable, "-c", textwrap.dedent(FILL), tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    told, end = ran.stdout.splitlines()
    assert "cannot write" in told and "make room" in told
    steps, kept = end.rsplit(" ", 1)
    assert steps == "[1, 2]" and int(kept) < 4
