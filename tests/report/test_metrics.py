"""Reading metrics.jsonl: order, repeated steps, half lines, damage."""

import json

import pytest

from fusejax.errors import InputError
from fusejax.report.metrics import read_series, smooth


def write(path, rows, *, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")
    return path


def test_series_are_ordered_and_the_last_value_of_a_step_counts(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 0, "loss": 4}]
    assert read_series(write(tmp_path / "m.jsonl", rows)) == {"loss": ([0.0, 1.0, 2.0], [4.0, 3.0, 2.0])}


def test_text_flags_and_lines_without_a_step_are_no_curves(tmp_path):
    rows = [{"note": "start"}, {"step": 1, "loss": 1.0, "finite": True, "arm": "clm", "nested": {"a": 1}}]
    assert read_series(write(tmp_path / "m.jsonl", rows)) == {"loss": ([1.0], [1.0])}


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"step": 1, "loss": 1.0}], end='{"step": 2, "lo')
    assert read_series(path) == {"loss": ([1.0], [1.0])}


@pytest.mark.parametrize(
    ("damage", "message"), [("not json\n", "line 2: not JSON"), ("[1]\n", "line 2: expected a JSON")]
)
def test_damage_is_named_with_its_line(tmp_path, damage, message):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + damage + '{"step": 2, "loss": 1.0}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_series(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        read_series(tmp_path / "gone.jsonl")


def test_smoothing_keeps_a_line_and_averages_noise():
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0], half_width=2) == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])
    assert smooth([0.0, 3.0, 0.0, 3.0], half_width=1) == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert smooth([], half_width=3) == []
