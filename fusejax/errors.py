"""Errors that a user can mend.

`InputError` is a `ValueError` raised for a bad configuration, argument or file; the command line turns it
into exit code 2 and prints its text without a traceback. Its text says what was wrong, what was got, what
was expected and what to do.

`Preempted` ends a run that was asked to stop, with its work kept: the same command goes on from there. `Stuck` ends one
that waits for a process which does not get on.
"""

__all__ = ["PREEMPTED", "WATCHDOG", "InputError", "Preempted", "Stuck", "nearest"]

import difflib
from collections.abc import Iterable

PREEMPTED, WATCHDOG = 85, 75  # exit codes after which a scheduler starts the same command again


class InputError(ValueError):
    """A configuration, argument or input file that cannot be used as it is."""


class Preempted(SystemExit):
    """A signal asked the run to stop, and it has; a SystemExit, so that nothing mistakes it for a failure.

    Args:
      message: what was saved, and how to go on.
      code: the exit code, 85 after SIGTERM and 130 after SIGINT.
    """

    def __init__(self, message: str, code: int = PREEMPTED):
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Stuck(TimeoutError):
    """Another process of the job was waited for, and has not got on for too long; exit code 75."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
