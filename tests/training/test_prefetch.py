"""Threads decode ahead, and nobody can tell: the same order, the same errors, nothing left behind."""

import signal
import threading
import time

import pytest

from training.data.prefetch import Prefetch
from xuracore.errors import ConfigError


def slow_square(n):
    time.sleep(0.001 * (7 * n % 5))  # later ones are often ready before earlier ones
    return n * n


def workers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_the_order_is_that_of_the_items(workers):
    with Prefetch(slow_square, range(40), workers) as results:
        assert list(results) == [n * n for n in range(40)]
        assert next(results, "end") == "end"
    assert not workers_alive()


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_error_comes_in_its_place_and_the_rest_follows(workers):
    def reciprocal(n):
        return 1 / n

    def items():
        yield from (1, 0, 2, 0)
        raise KeyError("the items themselves")

    said = []
    with Prefetch(reciprocal, items(), workers) as results:
        while True:
            try:
                said.append(next(results))
            except StopIteration:
                break
            except Exception as error:
                said.append(type(error))
    assert said == [1, ZeroDivisionError, 0.5, ZeroDivisionError, KeyError]


def test_no_more_waits_than_was_allowed():
    started, read = [], []

    def items():
        for n in range(100):
            read.append(n)
            yield n

    with Prefetch(started.append, items(), workers=2, ahead=5) as results:
        next(results)
        assert len(read) == 5 and len(started) <= 5
    assert len(read) == 5


def test_ctrl_c_leaves_no_thread(interruptible):
    begun = []

    def work(n):
        begun.append(n)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        with Prefetch(work, range(1000), workers=3, ahead=100) as results:
            next(results)
            signal.raise_signal(signal.SIGINT)
    assert not workers_alive() and len(begun) < 20


def test_senseless_numbers_are_refused():
    with pytest.raises(ConfigError):
        Prefetch(slow_square, [], workers=-1)
    with pytest.raises(ConfigError):
        Prefetch(slow_square, [], ahead=0)
