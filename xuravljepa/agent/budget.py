"""What one question may cost, and the meter that watches it."""

import dataclasses

from xuracore.errors import ConfigError


MOST = 100  # of readings, calls and errors: what a trace can hold


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits for one question.  Zero is allowed everywhere: the first reading is then the answer."""

    depth: int = 3  # how often the model may read again
    calls: int = 3  # of tools, failed ones included
    seconds: float = 10.0  # of wall-clock time, the model's own included
    bytes: int = 16_384  # of tool text that is read back
    errors: int = 2  # failures that are survived; one more ends the search

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value < float("inf")):
                raise ConfigError(f"Budget.{field.name} must be a number ≥ 0 and finite, not {value!r}")
            if field.name in ("depth", "calls", "errors") and value > MOST:
                raise ConfigError(f"Budget.{field.name} is at most {MOST}, not {value}")
            if field.type is int and not isinstance(value, int):
                raise ConfigError(f"Budget.{field.name} must be a whole number, not {value!r}")


class Meter:
    """Counts what has been spent of a budget.

    Args:
        budget: ``Budget``.
        clock: gives seconds; its zero does not matter.
    """

    def __init__(self, budget, clock):
        self.budget, self._clock, self._start = budget, clock, clock()
        self.depth = self.calls = self.bytes = self.errors = 0
        self.elapsed = 0.0  # seconds at the last look at the clock

    def seconds_left(self):
        """Look at the clock."""
        self.elapsed = max(self.elapsed, self._clock() - self._start)
        return self.budget.seconds - self.elapsed

    def exhausted(self):
        """``"max_depth"`` or ``"budget"`` where nothing more may be tried, else an empty string."""
        if self.depth >= self.budget.depth:
            return "max_depth"
        spent = self.calls >= self.budget.calls or self.bytes >= self.budget.bytes
        return "budget" if spent or self.seconds_left() <= 0 else ""

    def charge_text(self, text):
        """Count a tool's text; False if it is more than what is left, and then it must not be read."""
        self.bytes += len(text.encode("utf-8", "replace"))
        return self.bytes <= self.budget.bytes
