"""The guard of a command, in this process."""

import os
import signal
import sys

import pytest

from fusejax.errors import PREEMPTED, Preempted
from fusejax.train.faults import guarded


def test_a_signal_that_a_finaliser_swallows_ends_the_command_as_it_asked(monkeypatch):
    """What is raised in a finaliser Python drops; what then fails, because the others have left, is no failure."""
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))

    with pytest.raises(Preempted) as found, guarded():
        held = Finalised()
        del held
        raise RuntimeError("connection closed by peer")
    assert dropped == [Preempted], "else the test shows nothing"
    assert found.value.code == PREEMPTED and isinstance(found.value.__cause__, RuntimeError)


def test_a_failure_without_a_signal_is_a_failure():
    with pytest.raises(RuntimeError, match="planted"), guarded():
        raise RuntimeError("planted")
