"""What is shown of long work, by whom, and that it counts as a sign of life."""

import sys

import pytest

from fusejax.io import progress as module
from fusejax.io.progress import last_beat, progress


@pytest.fixture
def clock(monkeypatch):
    """The time, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return now


def test_lines_say_what_is_done_and_how_long_the_rest_takes(clock, capsys):
    with progress("train fused", total=10_000, unit="tokens") as bar:
        assert bar.line() == "train fused: 0/10.0k tokens, 0 tokens/s, ? left"
        bar.start_at(4000)  # in an earlier run: not in the rate
        clock[0] += 8
        bar.update(2000, loss=1.23456, step=3)
        assert bar.line() == "train fused: 6.0k/10.0k tokens, 250 tokens/s, 0:00:16 left loss=1.235 step=3"
        assert not capsys.readouterr().err  # a line every ten seconds
        clock[0] += 3600
        bar.update(1)
        assert capsys.readouterr().err == bar.line() + "\n"
        assert " 2:00:10 left " in bar.line()
        assert last_beat() == clock[0]
    assert capsys.readouterr().err == "train fused: 6.0k tokens in 3608.0 s\n"


def test_only_the_first_process_speaks(clock, capsys, monkeypatch):
    monkeypatch.setattr("fusejax.parallel.processes.is_first", lambda: False)
    with progress("capture a", total=10, unit="bytes") as bar:
        clock[0] += 60
        bar.update(5)
    assert capsys.readouterr() == ("", "")
    assert last_beat() == clock[0]
