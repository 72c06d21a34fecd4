"""A program does what its calls do, one after the other, for any number of threads, whenever these come."""

import threading
import time

import numpy as np
import pytest

from xuracore import jit, program, threads
from xuracore.jit import kernel, prange
from xuracore.program import Program


def spread_numpy(x, factor, shift, y):
    y[...] = x.sum() * factor + shift + np.arange(y.size)


@kernel(twin=spread_numpy, parallel=True)
def spread(x, factor, shift, y):
    """Each number of y needs all of x: a call that began too early would show."""
    for index in prange(y.size):
        i = np.int64(index)
        total = 0.0
        for j in range(x.size):
            total += x[j]
        y[i] = total * factor + shift + i


def reserve_numpy(size, out):
    np.empty(size)
    out += 1


@kernel(twin=reserve_numpy, parallel=True)
def reserve(size, out):
    for i in prange(out.size):
        room = np.empty(size)
        room[0] = 1
        out[i] += room[0]


def chain(length, size=6):
    arrays = [np.zeros(size) for _ in range(length + 1)]
    return arrays, [(spread, size, (x, 0.125, 3, y)) for x, y in zip(arrays, arrays[1:])]


@pytest.fixture(params=[1, 2, 3])
def crew_of(request, monkeypatch):
    monkeypatch.setattr(threads, "_threads", request.param)
    monkeypatch.setattr(program, "CALL_WORK", 0)


def test_calls_are_made_in_order_with_what_the_arrays_hold(crew_of):
    (first, *others), calls = chain(40)
    expected, run = np.zeros_like(first), Program(calls)
    for turn in range(30):
        expected[:] = first[:] = np.arange(first.size) * turn
        for _ in calls:
            spread_numpy(expected.copy(), 0.125, 3, expected)
        run()
        assert np.array_equal(others[-1], expected)
        for each in others:
            each[:] = np.nan
        if turn % 10 == 0:
            time.sleep(0.002)  # workers fall asleep


def test_an_empty_program_does_nothing(crew_of):
    arrays, calls = chain(2)
    Program(calls)()
    before = [each.copy() for each in arrays]
    empty = Program([])
    empty()
    empty()
    assert all(np.array_equal(*pair) for pair in zip(arrays, before))


def test_several_threads_run_programs_of_their_own(crew_of):
    results = []

    def work():
        arrays, calls = chain(10)
        run = Program(calls)
        for _ in range(50):
            run()
        results.append(arrays[-1].copy())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert len(results) == 3 and all(np.array_equal(each, results[0]) for each in results)


@pytest.mark.skipif(jit.backend() != "numba", reason="compiled kernels only")
def test_a_call_that_fails_is_an_error(crew_of):
    out = np.zeros(4)
    run = Program([(reserve, 4, (8, out))])
    run()
    run()
    assert (out == 2).all()
    with pytest.raises(MemoryError):
        failing = Program([(reserve, 4, (1 << 60, out))])
        failing()
