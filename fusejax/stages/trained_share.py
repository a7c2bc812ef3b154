"""The share of tokens that is trained, watched from the first steps on: 0 % and 100 % are how lost masks look.

A mask that is all zeros trains nothing and looks like a very good loss. One that is all ones, where the corpus says
that some text (a user's turns, a prompt) is not to be learned, trains on all of it. Both are seen in the first steps
and would otherwise be found after the training.
"""

__all__ = ["ShareAlarm"]

from collections.abc import Mapping
from typing import Any

from fusejax.errors import InputError
from fusejax.io.progress import say


class ShareAlarm:
    """Looks at the steps of one training; `alarm(step, values)` after each.

    Args:
        label: of the training, for messages.
        split: facts of the corpus's split: `bytes`, and `trained_bytes` where documents say what is trained.
        steps: how many steps of nothing but 0 % or 100 % are an alarm.
    """

    def __init__(self, label: str, split: Mapping[str, Any], *, steps: int = 10):
        self._label, self._wanted = label, split.get("trained_bytes", split["bytes"]) / max(split["bytes"], 1)
        self._steps, self._seen, self._total = steps, 0, 0.0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Takes a step's `trained_share`.

        Raises:
            InputError: not a token was trained in any of the first steps.
        """
        if self._seen >= self._steps:
            return
        self._seen, self._total = self._seen + 1, self._total + values["trained_share"]
        if self._seen < self._steps:
            return
        if self._total == 0.0:
            raise InputError(
                f"{self._label}: none of the tokens of {self._steps} steps is trained, the mask is 0 everywhere; the "
                f"corpus wants {self._wanted:.0%} of its bytes trained. Make the captures again, or look at the spans"
            )
        if self._total >= self._steps and self._wanted < 1.0:
            say(
                f"{self._label}: WARNING: 100 % of the tokens are trained, but the corpus wants {self._wanted:.0%} of "
                "its bytes trained; the mask of prompts and users' turns was lost on the way"
            )
