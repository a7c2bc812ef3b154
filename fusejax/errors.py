"""Errors that a user can mend.

`InputError` is a `ValueError` raised for a bad configuration, argument or file; the command line turns it
into exit code 2 and prints its text without a traceback. Its text says what was wrong, what was got, what
was expected and what to do.
"""

__all__ = ["InputError", "nearest"]

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A configuration, argument or input file that cannot be used as it is."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
