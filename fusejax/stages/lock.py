"""One process at a time in a directory: two runs that replace each other's unfinished shards would mix them.

The lock is the system's (`flock`) on a small file, so a killed process leaves none behind. Where the file system
or the system has no such locks, there is none, and that is said.
"""

__all__ = ["exclusive"]

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fusejax.errors import InputError
from fusejax.io.progress import beat, say

_LOOK_SECONDS = 0.2


@contextlib.contextmanager
def exclusive(directory: Path, *, wait: bool = False, shared: bool = False, name: str = ".lock") -> Iterator[None]:
    """Holds `directory` while the block runs.

    Args:
      directory: exists and can be written.
      wait: wait for another process that holds it, instead of refusing.
      shared: beside others that hold it shared, too.
      name: of the lock, where a directory has several.

    Raises:
      InputError: another process holds it.
    """
    handle = os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(handle, directory, wait=wait, shared=shared)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, kind: int) -> bool:
    import fcntl

    try:
        fcntl.flock(handle, kind)
    except BlockingIOError:
        return False
    return True


def _acquire(handle: int, directory: Path, *, wait: bool, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:
        say(f"{directory}: this system has no file locks; let only one fusejax work there")
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 20, 0).decode() or "unknown"
        if not wait:
            raise InputError(
                f"another fusejax (process {holder}) is working in {directory}; wait for it, or set another `output`"
            ) from error
        say(f"waiting for another fusejax (process {holder}) in {directory}")
        while not _locked(handle, kind | fcntl.LOCK_NB):
            time.sleep(_LOOK_SECONDS)
            beat()  # the other may need days
    except OSError as error:
        say(f"{directory} cannot be locked ({error.strerror}); let only one fusejax work there")
