import json
import math
import sys
from types import SimpleNamespace

import pytest

from fusejax.errors import InputError
from fusejax.train.metrics import MetricsWriter, read_metrics


def test_lines_are_appended_and_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    with MetricsWriter(path, resume_step=3) as writer:
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
        writer.write(4, {"loss": 7.0})
    assert read_metrics(path)[-1] == {"step": 4, "loss": 7.0}
    with MetricsWriter(path):
        assert read_metrics(path) == []


def test_every_line_is_json(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write(1, {"loss": math.nan, "norm": math.inf, "note": "x"})
    line = (tmp_path / "m.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "note": "x"}


def test_a_foreign_line_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(InputError, match="line 2"):
        MetricsWriter(tmp_path / "m.jsonl", resume_step=1)


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path / "m.jsonl", tensorboard_dir=tmp_path / "board") as writer:
        writer.write(1, {"loss": 2.0, "note": "x"})
    assert b"loss" in next((tmp_path / "board").iterdir()).read_bytes()


def test_wandb_gets_the_numbers_and_no_configuration(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: calls.append(given) or Run()))
    for resume in (None, 1):
        with MetricsWriter(tmp_path / "m.jsonl", wandb_project="fusion", resume_step=resume) as writer:
            writer.write(1, {"loss": 2.0, "note": "x"})
    first, second = [call for call in calls if isinstance(call, dict)]
    assert first["id"] == second["id"] and first["project"] == "fusion" and "config" not in first
    assert (1, {"loss": 2.0}) in calls and calls.count("finish") == 2
