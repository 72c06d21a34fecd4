"""What a person sees of a running training, and what a program can read of it."""

import csv
import io
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

TIMINGS = ("seconds", "samples_per_second", "data_seconds", "peak_mb")  # log entries that no seed fixes


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
        self._first, self._started, self._last, self._width = None, time.monotonic(), -math.inf, 0

    def show(self, step, values):
        """Report that ``step`` steps are done; ``values`` is a dict of numbers to show."""
        if self.stream is None:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = step, now  # kernels compiled before that: what it took says nothing about the rest
        if step < self.total and now - self._last < (0.1 if self._terminal else self.seconds):
            return
        self._last = now
        (first, since), left = self._first, ""
        if step > first:
            left = f"left {duration((now - since) / (step - first) * (self.total - step))}"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        text = f"{self.label} {step}/{self.total}  {shown}  "
        text += left if step < self.total else f"took {duration(now - self._started)}"
        if self._terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text.rstrip() + "\n")
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
    """A JSONL file, one record a line, flushed as it is written; beside it the same as a table, in CSV.

    last_step : on resume, records of later steps are dropped, so that the file is the one an
        uninterrupted run would have written.  None starts an empty file.

    The table has a column for every name that any record has, so it is written anew when a name is new.
    """

    def __init__(self, path, last_step=None):
        self.path, self.table = path, path.with_suffix(".csv")
        kept = [] if last_step is None or not path.exists() else _records_until(path, last_step)
        write_atomically(path, [b"".join(kept)])
        self._file, self._columns = open(path, "a", encoding="utf-8"), None
        self._write_table()

    def write(self, record):
        """Append ``record`` (a dict of JSON data; a number that is not finite becomes null)."""
        finite = {key: None if _not_finite(value) else value for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if finite.keys() <= self._columns.keys():
            with open(self.table, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(finite)
        else:
            self._write_table()

    def _write_table(self):
        records = read_metrics(self.path)
        self._columns = dict.fromkeys(name for record in records for name in record)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if records:
            writer.writeheader()
            writer.writerows(records)
        write_atomically(self.table, [text.getvalue().encode()])

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


class Taken:
    """Batches as they are taken for one step: how many samples, and how long it took to get them."""

    def __init__(self, source):
        self.source, self.samples, self.seconds = source, 0, 0.0

    def __call__(self, index):
        before = time.perf_counter()
        batch = self.source(index)
        self.seconds += time.perf_counter() - before
        self.samples += samples_of(batch)
        return batch


class Window:
    """Means over the steps since the last log record."""

    def __init__(self, steps=0, samples=0, seconds=0.0, data_seconds=0.0, sums=None):
        self.steps, self.samples, self.seconds, self.data_seconds = steps, samples, seconds, data_seconds
        self.sums = dict(sums or {})  # name -> [sum of the finite values, how many]

    def add(self, record, samples, seconds, data_seconds):
        self.steps += 1
        self.samples += samples
        self.seconds += seconds
        self.data_seconds += data_seconds
        for name, value in record.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value, count + 1]

    def state(self):
        return dict(vars(self))

    def close(self):
        """The means as a dict, and an empty window."""
        record = {name: total / count for name, (total, count) in self.sums.items()}
        record.update(
            seconds=round(self.seconds, 3),
            samples_per_second=round(self.samples / max(self.seconds, 1e-9), 1),
            data_seconds=round(self.data_seconds, 3),
            peak_mb=peak_megabytes(),
        )
        self.__init__()
        return record


def samples_of(batch):
    """How many samples: the length of the first array of a dict (of dicts) or tuple, or of the batch itself."""
    if isinstance(batch, dict):
        return samples_of(next(value for value in batch.values() if value is not None))
    if isinstance(batch, tuple):
        batch = batch[0]
    return len(batch)


class Best:
    """The best of a monitored number so far, and how many evaluations have gone by without a real gain.

    ``value`` is the best; ``reference`` the last that was better than the one before by more than ``min_delta``.
    """

    def __init__(self, value=None, reference=None, waited=0):
        self.value, self.reference, self.waited = value, reference, waited

    def judge(self, value, mode, min_delta):
        """Take in a new number, better if greater (``mode`` "max") or less ("min"); whether it is the best."""
        sign = 1 if mode == "max" else -1
        if not math.isfinite(value):
            self.waited += 1
            return False
        gained = self.reference is None or sign * (value - self.reference) > min_delta
        self.reference, self.waited = (value, 0) if gained else (self.reference, self.waited + 1)
        better = self.value is None or sign * value > sign * self.value
        self.value = value if better else self.value
        return better

    def state(self):
        """JSON data for :meth:`of`."""
        return {"best": self.value, "reference": self.reference, "waited": self.waited}

    @classmethod
    def of(cls, state):
        return cls(state["best"], state.get("reference", state["best"]), state["waited"])
