"""Ranks that are threads of one process, so that the mathematics of several processes is always tested."""

import threading

import pytest

import xuracore as xc
from training.parallel import Ranks


class Meeting:
    """Where the threads meet.  One runs at a time: who waits for the others lets the next one run."""

    def __init__(self, size):
        self.size, self.turn, self.barrier = size, threading.Lock(), threading.Barrier(size)
        self.brought = {}

    def exchange(self, number, rank, data):
        """What every rank brought to meeting ``number``."""
        self.brought.setdefault(number, {})[rank] = data
        self.turn.release()
        try:
            self.barrier.wait(timeout=60)
        finally:
            self.turn.acquire()
        return [self.brought[number][rank] for rank in range(self.size)]


class ThreadRanks(Ranks):
    def __init__(self, rank, meeting):
        self.rank, self.size, self.meeting, self.number = rank, meeting.size, meeting, 0

    def _exchange(self, data):
        self.number += 1
        return self.meeting.exchange(self.number, self.rank, data)

    def gather_bytes(self, data):
        return self._exchange(bytes(data))

    def add_up(self, array):
        first, *others = self._exchange(array.copy())
        array[...] = sum(others, start=first.copy())

    def spread(self, array):
        array[...] = self._exchange(array.copy())[0]


@pytest.fixture(scope="session")
def on_ranks():
    return run_on_ranks


def run_on_ranks(size, work):
    """[work(ranks) of each rank]; raises the error of the first rank that failed on its own account."""
    meeting, results, errors = Meeting(size), [None] * size, {}

    def run(rank):
        with meeting.turn:
            try:
                results[rank] = work(ThreadRanks(rank, meeting))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors[rank] = error
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return results


@pytest.fixture
def threads_of_its_own():
    """For scripts that are called in this process and set the number of threads."""
    before = xc.get_num_threads()
    yield
    xc.set_num_threads(before)
