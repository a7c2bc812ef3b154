"""The benchmark of merges runs at a small scale, says what it measured and leaves nothing behind."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.once


def test_the_benchmark_runs(tmp_path):
    call = [sys.executable, "benchmarks/merge.py", "--scale", "small", "--only", "ties 0.6", "--dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path.parent / "programs")}
    environment |= {f"JAX_PERSISTENT_CACHE_MIN_{what}": "0" for what in ("COMPILE_TIME_SECS", "ENTRY_SIZE_BYTES")}
    for _ in range(2):  # the first compiles; what that takes is not the merge's, and depends on the machine's load
        subprocess.run(
            [*call, "--json", tmp_path / "rows.json"], cwd=ROOT, env=environment, check=True, capture_output=True
        )
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["name"] == "ties 0.6"
    assert 0 < row["cpu_seconds"] < 60
    assert row["peak_bytes"] > 10**7
    assert row["baseline"] is None  # nothing was published at this scale
    assert row["within_bound"]
    assert "| ties 0.6 |" in (tmp_path / "rows.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.md"]
