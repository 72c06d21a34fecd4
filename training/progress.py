"""What a person sees of a running training, and what a program can read of it."""

import json
import math
import sys
import time

from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically

try:
    import resource
except ImportError:  # Windows
    resource = None


def duration(seconds):
    """``seconds`` as "4s", "3m20s" or "1h05m"."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def peak_megabytes():
    """Largest resident memory of this process so far, or None where the system does not tell."""
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


class ProgressLine:
    """One line that rewrites itself on a terminal; elsewhere a plain line every ``seconds``.

    total : number of steps.   stream : a text stream, usually ``sys.stderr``; None is silent.
    """

    def __init__(self, total, stream=None, seconds=10.0, label="step"):
        self.total, self.stream, self.seconds, self.label = total, stream, seconds, label
        self._terminal = stream is not None and stream.isatty()
        self._first, self._started, self._last, self._width = None, None, -math.inf, 0

    def show(self, step, values):
        """Report that ``step`` steps are done; ``values`` is a dict of numbers to show."""
        if self.stream is None:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = step - 1, now
        if step < self.total and now - self._last < (0.1 if self._terminal else self.seconds):
            return
        self._last = now
        done = step - self._first
        left = (now - self._started) / done * (self.total - step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        text = f"{self.label} {step}/{self.total}  {shown}  "
        text += f"left {duration(left)}" if step < self.total else f"took {duration(now - self._started)}"
        if self._terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def say(self, text):
        """A line of its own, which stays."""
        if self.stream is not None:
            self.close()
            self.stream.write(text + "\n")
            self.stream.flush()

    def close(self):
        """End the line that rewrites itself."""
        if self._terminal and self._width:
            self.stream.write("\n")
            self._width = 0


class MetricLog:
    """A JSONL file, one record a line, flushed as it is written.

    last_step : on resume, records of later steps are dropped, so that the file is the one an
        uninterrupted run would have written.  None starts an empty file.
    """

    def __init__(self, path, last_step=None):
        self.path = path
        kept = [] if last_step is None or not path.exists() else _records_until(path, last_step)
        write_atomically(path, [b"".join(kept)])
        self._file = open(path, "a", encoding="utf-8")

    def write(self, record):
        """Append ``record`` (a dict of JSON data; a number that is not finite becomes null)."""
        finite = {key: None if _not_finite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self):
        self._file.close()


def _not_finite(value):
    return isinstance(value, float) and not math.isfinite(value)


def _records_until(path, last_step):
    kept = []
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                break  # a line cut off by a crash is the last one
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise FormatError("is not a metrics file: a line without a step", str(path))
            if record["step"] <= last_step:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
    return kept


def read_metrics(path):
    """The records of a metrics file, as a list of dicts."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
