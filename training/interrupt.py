"""Ctrl-C and friends as a request to stop at the next good moment."""

import contextlib
import signal
import threading

SIGNALS = ("SIGINT", "SIGTERM")


class Interruption:
    """What has been asked for: ``asked`` is the name of the signal, or None.

    say : called with a line that tells the person so.   names : of the signals that count.
    """

    def __init__(self, say, names=SIGNALS):
        self.asked, self._say, self._names = None, say, names

    @contextlib.contextmanager
    def listening(self):
        """Within, the first signal is a request and a second one KeyboardInterrupt; only in the main thread."""
        self.asked = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in self._names if hasattr(signal, name)]
        earlier = {number: signal.signal(number, self._request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _request(self, number, frame):
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        self._say(f"{self.asked}: finishing this step, then saving; once more stops at once")
