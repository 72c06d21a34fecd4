"""Work ahead in threads, and hand over the results in the order they were asked for.

Decoding pictures releases Python's lock, so threads do it beside everything else.  Never a fork: a process that has
started the kernels' threads must not be copied.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from xuracore.errors import ConfigError


class Prefetch:
    """An iterator of ``function(item)`` for each item, in the order of the items, whatever the number of workers.

        with Prefetch(decode, paths, workers=2) as pictures:
            for picture in pictures: …

    function : called in other threads; it must not depend on the order of its calls.   ahead : results that may wait,
    which bounds the memory (default twice the workers).   workers : 0 calls it when asked, in the caller's thread.

    What the function raises, the iterator raises in the place of that result, and goes on with the next one.  Leaving
    the ``with``, by Ctrl-C too, drops what has not begun and waits for the rest: no thread is left behind.
    """

    def __init__(self, function, items, workers=2, ahead=None):
        if workers < 0 or ahead is not None and ahead < 1:
            raise ConfigError(f"workers is {workers} and ahead {ahead}; expected at least 0 and 1")
        self._function, self._items = function, iter(items)
        self._ahead = ahead or max(1, 2 * workers)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if workers else None
        self._waiting, self._ended = deque(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __iter__(self):
        return self

    def __next__(self):
        while not self._ended and len(self._waiting) < (self._ahead if self._pool else 1):
            self._ask()
        if not self._waiting:
            self.close()
            raise StopIteration
        result = self._waiting.popleft()
        return result.result() if isinstance(result, Future) else self._function(*result)

    def _ask(self):
        """Hand one more item to the workers."""
        try:
            item = next(self._items)
        except StopIteration:
            self._ended = True
        except Exception as error:  # raised in its place, like those of the function; nothing follows
            self._ended = True
            failed = Future()
            failed.set_exception(error)
            self._waiting.append(failed)
        else:
            self._waiting.append(self._pool.submit(self._function, item) if self._pool else (item,))

    def close(self):
        """Give up what has not begun and wait for the rest; the iterator is at its end."""
        self._ended = True
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
