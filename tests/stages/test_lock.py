"""One process at a time in a run's directory."""

import multiprocessing

import pytest

from fusejax.errors import InputError
from fusejax.stages.lock import exclusive


def _hold(directory, held, release):
    with exclusive(directory):
        held.set()
        release.wait(30)


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=rf"process {other.pid}\) is working in"), exclusive(tmp_path):
        pass
    other.kill()
    other.join()
    with exclusive(tmp_path):
        pass


def test_waiting_goes_on_when_the_other_is_done(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(60)
    release.set()
    with exclusive(tmp_path, wait=True):
        pass
    other.join()
    assert other.exitcode == 0
