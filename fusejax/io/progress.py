"""Progress of everything that takes longer than two seconds: a bar on a terminal, plain lines elsewhere.

Both go to standard error, so that the last line of standard output stays machine-readable. Without a terminal
a line is printed every ten seconds, with the rate and the time that is left. Of several processes only the first
speaks: the others would say the same.

Every piece of work that is counted here is also a sign of life (`beat`), for this process's watchdog and for the
processes that wait for this one. Long work without a bar calls `beat` itself.
"""

__all__ = ["Progress", "beat", "last_beat", "progress", "say"]

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

_PLAIN_SECONDS = 10.0
_TELL_SECONDS = 1.0  # between two signs of life to other processes


class _Life:
    count, when, told = 0, time.monotonic(), 0.0


def beat() -> None:
    """Says that a piece of work is done; costs a microsecond."""
    _Life.count += 1
    _Life.when = time.monotonic()
    if _Life.when - _Life.told > _TELL_SECONDS and "jax" in sys.modules:
        from fusejax.parallel.processes import tell_progress

        _Life.told = _Life.when
        tell_progress(_Life.count)


def last_beat() -> float:
    """When this process last said that a piece of work is done, by the clock of `time.monotonic`."""
    return _Life.when


def say(text: str) -> None:
    """Prints one line to standard error."""
    if _silent():
        return
    print(text, file=sys.stderr, flush=True)


def _silent() -> bool:
    if "jax" not in sys.modules:  # then nobody has started several processes
        return False
    from fusejax.parallel.processes import is_first

    return not is_first()


def _count(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Progress:
    """Counts work done and shows it; made by `progress`."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._first = 0
        self._start = self._shown = time.monotonic()
        self._fields = ""
        self._bar: Any = None
        self._task: Any = None

    def start_at(self, done: int) -> None:
        """Says that `done` units were finished in an earlier run; they do not count in the rate."""
        self.done = self._first = done
        beat()
        self._show()

    def update(self, units: int, **fields: Any) -> None:
        """Counts `units` more and shows `fields` (name=value) beside the bar."""
        self.done += units
        beat()
        if fields:
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())
            self._fields = " ".join(shown)
        self._show()

    @property
    def rate(self) -> float:
        """Units per second in this run."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def line(self) -> str:
        """One line: done of total, rate, remaining time, fields."""
        left = (self.total - self.done) / self.rate if self.done > self._first else float("nan")
        left_text = _clock(left) if left == left and left >= 0 else "?"
        return (
            f"{self.label}: {_count(self.done)}/{_count(self.total)} {self.unit}, "
            f"{_count(self.rate)} {self.unit}/s, {left_text} left {self._fields}"
        ).rstrip()

    def _show(self) -> None:
        if self._bar is not None:
            info = f"{_count(self.rate)} {self.unit}/s {self._fields}"
            self._bar.update(self._task, completed=self.done, info=info)
            return
        now = time.monotonic()
        if _silent():
            return
        if now - self._shown >= _PLAIN_SECONDS and self.done > self._first:
            self._shown = now
            say(self.line())


@contextlib.contextmanager
def progress(label: str, *, total: int, unit: str) -> Iterator[Progress]:
    """Shows progress towards `total` units while the block runs.

    Args:
      label: what is being done.
      total: number of units.
      unit: name of a unit, such as "tokens".
    """
    counter = Progress(label, total, unit)
    if _silent():
        yield counter
        return
    if not sys.stderr.isatty():
        yield counter
        elapsed = time.monotonic() - counter._start
        if elapsed > 2.0:
            say(f"{label}: {_count(counter.done)} {unit} in {elapsed:.1f} s")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=False) as bar:
        counter._bar = bar
        counter._task = bar.add_task(label, total=total, info="")
        yield counter
