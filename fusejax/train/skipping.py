"""Which steps are left out: a loss that is not finite or, where asked, one far above the recent ones.

The step itself leaves such an update out (`fusejax.train.step`), because its state is donated; here is the threshold
that it is given, and the count of steps left out in a row, after which the run stops. The threshold of step n is
`spike_factor` times the median of the last 32 accepted losses up to step n - 2, from the 16th on: step n - 1 may
still be on the device, and a resumed run must come to the same number. So it is kept in the checkpoint.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from fusejax.errors import InputError

__all__ = ["SkipPolicy"]

_WINDOW, _FROM, _LAG = 32, 16, 2


class SkipPolicy:
    """Counts steps that were left out, and says from which loss on the next one is to be.

    Args:
        max_skipped: steps in a row that may be left out; 0 stops at the first.
        spike_factor: times the median of recent losses; None: any finite loss is taken.
    """

    def __init__(self, *, max_skipped: int = 0, spike_factor: float | None = None):
        if max_skipped < 0 or (spike_factor is not None and not spike_factor > 1):
            raise InputError(f"max_skipped {max_skipped} must be >= 0 and spike_factor {spike_factor} above 1 or None.")
        self._max, self._factor = max_skipped, spike_factor
        self._in_a_row = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=_WINDOW + _LAG)

    def limit(self, step: int) -> float | None:
        """Returns the loss above which step `step` (from 1) is left out; None where there is no such thing."""
        if self._factor is None:
            return None
        known = [loss for at, loss in self._losses if at <= step - _LAG][-_WINDOW:]
        return self._factor * statistics.median(known) if len(known) >= _FROM else math.inf

    def judge(self, step: int, loss: float, grad_norm: float, *, skipped: bool, documents: Callable[[], Any]) -> str:
        """Counts a step; returns what to say of one that was left out, "" for any other.

        Raises:
            FloatingPointError: more than `max_skipped` in a row; it names the step and its documents.
        """
        if not skipped:
            self._in_a_row = 0
            self._losses.append((step, loss))
            return ""
        self._in_a_row += 1
        limit = self.limit(step)
        spike = f" (above {limit:.4g})" if limit is not None and math.isfinite(loss) and loss > limit else ""
        what = f"step {step} has loss {loss}{spike} and gradient norm {grad_norm}"
        names = ", ".join(documents())
        if self._in_a_row > self._max:
            raise FloatingPointError(
                f"{what}; the parameters were left as they were before it and nothing was saved. Its documents: "
                f"{names}. {self._in_a_row} in a row is more than faults.max_skipped_steps = {self._max}. Look at "
                "these documents, or lower the learning rate."
            )
        return f"{what}: left out ({self._in_a_row} of at most {self._max} in a row). Its documents: {names}"

    def get_state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON."""
        return {"in_a_row": self._in_a_row, "losses": [list(entry) for entry in self._losses]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from `get_state`."""
        self._in_a_row = int(state["in_a_row"])
        self._losses.extend((int(step), float(loss)) for step, loss in state["losses"])
