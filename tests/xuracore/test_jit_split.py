"""Long kernels as runs of tasks: every task once, errors come out, forked children work."""

import multiprocessing

import numpy as np
import pytest

from xuracore import jit, threads
from xuracore.jit import kernel


def _square_numpy(x, out):
    out[...] = x * x


@kernel(twin=_square_numpy)
def square(start, stop, x, out):
    for i in range(start, stop):
        out[i] = x[i] * x[i]


def squared(count, work=10**9):
    x, out = np.arange(count, dtype=np.float64), np.full(count, np.nan)
    square.split(count, work)(x, out)
    return np.array_equal(out, x * x)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("work", [0, 10**9])
def test_every_task_is_done(count, work):
    assert squared(count, work)


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_the_runs_cover_the_tasks_once_and_in_order(runs):
    seen = [range(start, stop) for start, stop in jit._bounds(runs, 11)]
    assert sorted(i for part in seen for i in part) == list(range(11))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_any_run_is_raised_after_all_have_ended(failing):
    ended = []

    def call(start, stop):
        if start == failing:
            raise ValueError("this run fails")
        ended.append(start)

    with pytest.raises(ValueError, match="this run fails"):
        threads.run([(call, i, i + 1) for i in range(3)])
    assert sorted(ended) == sorted({0, 1, 2} - {failing})


def _in_child(connection):
    connection.send(squared(1000))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_threads():
    threads.run([(int,), (int,)])  # the parent's threads are up
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(there,))
    child.start()
    assert here.poll(60) and here.recv()
    child.join(60)
