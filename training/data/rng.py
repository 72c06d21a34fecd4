"""Random draws that depend on a name alone, never on who asks or when.

Sample ``i`` of a split must be the same image whichever worker makes it, in whatever order, on
whatever machine, next year.  So each sample owns a Philox generator (Salmon et al. 2011) whose
128-bit key is the head of SHA-256(version | purpose | seed | split | i).  Only the raw 64-bit words
of the generator are used, because NumPy guarantees those for ever, but not the algorithms of
``Generator.integers`` or ``permutation``; all derived draws are integer arithmetic written here.
"""
import hashlib

import numpy as np

GENERATOR_VERSION = "xura-data-1"
_WORD = 64
_REFILL = 64


class Draws:
    """A stream of random draws named by ``key`` (any mix of strings and integers).

    >>> Draws("scene", 0, "train", 7).below(10) == Draws("scene", 0, "train", 7).below(10)
    True
    """

    __slots__ = ("_bits", "_words")

    def __init__(self, *key):
        name = "|".join((GENERATOR_VERSION, *map(str, key)))
        digest = hashlib.sha256(name.encode()).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest[:16], "<u8").astype(np.uint64))
        self._words = []

    def word(self):
        """The next 64 random bits, as a Python integer."""
        if not self._words:
            self._words = self._bits.random_raw(_REFILL).tolist()[::-1]
        return self._words.pop()

    def below(self, bound):
        """An integer in ``[0, bound)``, uniform to 2**-64 relative."""
        return (self.word() * bound) >> _WORD

    def between(self, low, high):
        """An integer in ``[low, high]``, both ends included."""
        return low + self.below(high - low + 1)

    def uniform(self):
        """A float in ``[0, 1)`` with 53 random bits."""
        return (self.word() >> 11) * 2.0 ** -53

    def choice(self, items):
        """One element of a non-empty sequence."""
        return items[self.below(len(items))]

    def weighted(self, items, weights):
        """One element of ``items``, with probability proportional to its weight."""
        left = self.uniform() * sum(weights)
        for item, weight in zip(items, weights):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def sample(self, items, count):
        """``count`` different elements of ``items``, in random order."""
        pool = list(items)
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def integers(self, low, high, shape):
        """int64 array of the given shape with entries in ``[low, high)``; the span is at most 2**31."""
        size = int(np.prod(shape))
        words = self._bits.random_raw(size) >> np.uint64(32)
        return (low + (words * np.uint64(high - low) >> np.uint64(32)).astype(np.int64)).reshape(shape)
