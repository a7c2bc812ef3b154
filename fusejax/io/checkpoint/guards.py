"""What a user is told when reading or writing a checkpoint fails, and what is cleared away then."""

import contextlib
import errno
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from fusejax.errors import InputError
from fusejax.io.checkpoint.checksums import DamagedCheckpoint

__all__ = ["explained", "quiet", "silenced", "writable"]


@contextlib.contextmanager
def writable(directory: Path, *, clear: Callable[[], object]) -> Iterator[None]:
    """Calls `clear` after a failed write; InputError where another directory helps, else OSError (a full disk)."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        code = _system_error(error)
        if isinstance(error, InputError) or code is None:
            raise
        clear()
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            text = f"cannot write {directory}: {os.strerror(code)}. Choose a directory that can be written."
            raise InputError(text) from error
        text = f"cannot write {directory}: {os.strerror(code)}. What was there before is intact; make room and go on"
        raise OSError(code, text) from error


def _system_error(error: BaseException | None) -> int | None:
    """The errno behind an exception; TensorStore gives it as text, and a thread as the cause."""
    while error is not None:
        if told := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(told.group(1))
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__
    return None


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Shortens the 30 kB of TensorStore text that do not name the cause of a failed read."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # too little memory is not a damaged file
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise DamagedCheckpoint(
            f"{place} cannot be read: {type(error).__name__}: {reason}. Files are missing or damaged; restore the "
            "directory from a copy, or ask for an earlier step."
        ) from error


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what Orbax and absl log from the user's terminal, and puts the levels back; failures are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """As `silenced`, and without warnings."""
    with silenced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
