"""Of several processes that start at the same time one compiles."""

import subprocess
import sys
import threading

import pytest
from filelock import FileLock

from ep_rebalance.balancer.ahead_of_time import _LOCK, _PROGRAM, compile_all
from ep_rebalance.compiled import cache_folder
from ep_rebalance.planning.incremental.descent import improve_layer

SECONDS = 3.0
"""Longer than it takes to load code that was compiled before."""


@pytest.fixture
def lock(compiled_planner: None) -> FileLock:
    folder = cache_folder(improve_layer)
    assert folder is not None
    return FileLock(folder / _LOCK)


def test_whoever_comes_second_waits_for_the_first(lock: FileLock):
    with lock:
        second = subprocess.Popen([sys.executable, "-c", _PROGRAM])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(SECONDS)
    assert second.wait(120) == 0


def test_the_lock_is_free_while_several_load_what_the_first_has_compiled(lock: FileLock):
    with lock:
        waiting = threading.Thread(target=compile_all)
        waiting.start()
    waiting.join()
    assert not lock.is_locked
    with lock.acquire(timeout=0):
        pass
