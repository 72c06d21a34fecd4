"""In-place changes, so that a backward pass can refuse numbers that are no longer those of the forward pass.

Memory has a version, counted from 0 and raised by every change made through Tensor methods, optimizers
and loaded states.  The tape pays nothing for it while recording: a change takes its number from the same
downward row as the nodes, so "changed after the op was recorded" is one comparison of integers.  Writing
to ``tensor.data`` directly goes unseen, unless ``tensor.mark_changed()`` follows.
"""

import itertools
import weakref
from collections import deque

import numpy as np

from xuracore.errors import GradError

next_number = itertools.count(0, -1).__next__
_HISTORY = 8  # changes of one memory whose order against a node is remembered
_changes = {}  # id of the array that owns the memory -> _Changes
_latest = [1]  # number of the latest change anywhere; 1 is before everything


class _Changes:
    """How often one memory was changed, when last, and the name of the tensor it was changed through."""

    __slots__ = ("owner", "version", "numbers", "name")

    def __init__(self, owner, key):
        self.owner = weakref.ref(owner, lambda _: _changes.pop(key, None))
        self.version, self.name, self.numbers = 0, None, deque(maxlen=_HISTORY)


def _owner(array):
    while type(array.base) is np.ndarray:
        array = array.base
    return array


def changed(array, name=None):
    """Count one change of the memory of ``array``; ``name`` is what messages call it."""
    owner = _owner(array)
    key = id(owner)
    record = _changes.get(key)
    if record is None:
        record = _changes[key] = _Changes(owner, key)
    record.version += 1
    record.name = name or record.name
    _latest[0] = number = next_number()
    record.numbers.append(number)


def version(array):
    """How often the memory of ``array`` was changed in ways that are counted."""
    record = _changes.get(id(_owner(array)))
    return record.version if record else 0


def latest_change():
    """Number of the latest change anywhere.  Nodes with a larger number are older."""
    return _latest[0]


def check(op, saved, number):
    """Raise GradError if an array in ``saved`` changed after ``number``, that of the node of ``op``."""
    if isinstance(saved, np.ndarray):
        record = _changes.get(id(_owner(saved)))
        since = sum(n < number for n in record.numbers) if record else 0
        if since:
            what = f"{record.name!r} {saved.shape}" if record.name else f"an array {saved.shape}"
            before = f"{record.version - since}" + (" or earlier" if since == _HISTORY else "")
            raise GradError(
                f"{op!r} saved {what} at version {before}, now {record.version}: it was changed in place between "
                "forward and backward. Call backward() before the change, or change a copy"
            )
    elif isinstance(saved, (tuple, list)):
        for part in saved:
            check(op, part, number)
    elif isinstance(saved, dict):
        check(op, list(saved.values()), number)
