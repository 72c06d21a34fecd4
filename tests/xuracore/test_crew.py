"""Threads that wait awake do each part of a kernel once, whoever asks, and whenever they fall asleep."""

import os
import threading
import time

import numpy as np
import pytest

from xuracore import crew, jit, threads
from xuracore.jit import kernel, prange

pytestmark = [
    pytest.mark.skipif(jit.backend() != "numba", reason="compiled kernels only"),
    pytest.mark.skipif(threads.available_cpus() < 2, reason="needs two processors"),
]


def count_numpy(x, out):
    out += x


@kernel(twin=count_numpy, parallel=True)
def count(x, out):
    for i in prange(x.size):
        out[i] += x[i]


def count_runs_numpy(x, out):
    out += x


@kernel(twin=count_runs_numpy)
def count_runs(start, stop, x, out):
    for i in range(start, stop):
        out[i] += x[i]


def reserve_numpy(size, out):
    np.empty(size)
    out += 1


@kernel(twin=reserve_numpy, parallel=True)
def reserve(size, out):
    for i in prange(out.size):
        room = np.empty(size)
        room[0] = 1
        out[i] += room[0]


@pytest.fixture
def woken(monkeypatch):
    """Counts the calls that went through Python: the others were handed over awake."""
    calls, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda jobs: (calls.append(1), run(jobs))[1])
    return calls


def shared(each):
    return each.in_parts(2) if each.parallel else each.split(1000, jit.PARALLEL_WORK)


@pytest.mark.parametrize("each", [count, count_runs], ids=lambda each: each.__name__)
def test_every_element_is_visited_once(each, woken):
    x, out = np.arange(1000.0), np.zeros(1000)
    before = threads.get_num_threads()
    threads.set_num_threads(2)
    try:
        for _ in range(500):
            shared(each)(x, out)
    finally:
        threads.set_num_threads(before)
    np.testing.assert_array_equal(out, 500 * x)
    assert len(woken) < 500


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_there_may_be_more_parts_than_threads(parts):
    x, out = np.arange(50.0), np.zeros(50)
    for _ in range(20):
        count.in_parts(parts)(x, out)
    np.testing.assert_array_equal(out, 20 * x)


def test_a_worker_that_fell_asleep_is_woken(woken):
    x, out = np.arange(50.0), np.zeros(50)
    for _ in range(5):
        count.in_parts(2)(x, out)
        time.sleep(0.02)
    np.testing.assert_array_equal(out, 5 * x)
    assert woken


def test_a_small_kernel_wakes_a_worker_only_for_a_dense_row_of_them(monkeypatch):
    x, out, asked, run = np.arange(50.0), np.zeros(50), [], threads.run
    monkeypatch.setattr(threads, "run", lambda jobs: (asked.append(len(jobs)), run(jobs))[1])
    monkeypatch.setattr(jit, "DENSE", 0.01)
    count.in_parts(2)(x, out)  # from here on its address is known
    asked.clear()
    for _ in range(5):
        time.sleep(0.02)
        count.in_parts(2, small=True)(x, out)
    assert set(asked) == {1}
    monkeypatch.setattr(jit, "DENSE", 10)
    count.in_parts(2, small=True)(x, out)
    assert asked[-1] == 2
    np.testing.assert_array_equal(out, 7 * x)


def test_callers_at_the_same_time_share_the_workers():
    x, outs = np.arange(200.0), [np.zeros(200) for _ in range(4)]

    def call(out):
        for _ in range(300):
            count.in_parts(3)(x, out)

    callers = [threading.Thread(target=call, args=(out,)) for out in outs]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    for out in outs:
        np.testing.assert_array_equal(out, 300 * x)


def test_types_are_told_apart_also_when_they_alternate():
    for dtype in (np.float64, np.float32) * 3:
        x, out = np.arange(50, dtype=dtype), np.zeros(50, dtype)
        for _ in range(3):
            count.in_parts(2)(x, out)
        np.testing.assert_array_equal(out, 3 * x)


def test_a_part_that_finds_no_memory_says_so():
    out = np.zeros(4)
    for _ in range(50):
        reserve.in_parts(2)(4, out)
    for _ in range(20):
        with pytest.raises(MemoryError):
            reserve.in_parts(2)(1 << 50, out)
    reserve.in_parts(2)(4, out)
    np.testing.assert_array_equal(out, np.full(4, 51.0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_boxes_of_its_own():
    x, out = np.arange(50.0), np.zeros(50)
    for _ in range(5):
        count.in_parts(2)(x, out)
    child = os.fork()
    if not child:
        for _ in range(5):
            count.in_parts(2)(x, out)
        os._exit(0 if np.array_equal(out, 10 * x) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_states_of_a_box_are_no_addresses():
    assert max(crew.ASLEEP, crew.WATCHING, crew.BUSY) < 8
