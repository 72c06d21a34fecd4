"""What a data set leaves out, and how much of that is too much.

A large collection of pictures always holds some that cannot be used.  Each is refused with its place and the
reason; the rest is used, unless the refused are more than the user allowed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from xuracore.config import require
from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically

KEPT = 10_000  # entries that are remembered; the others are counted
_SHOWN = 5
_MAX_REASON = 300


class Refused(ValueError):
    """Why one entry is left out, in words."""


@dataclass(frozen=True)
class BadRow:
    """An entry that was left out: its file, where in it, and why.

    ``line`` counts from 1, or is a name in an archive; None for the file as a whole.
    """

    file: str
    line: int | str | None
    reason: str

    def __str__(self):
        return f"{self.file}:{'' if self.line is None else f'{self.line}:'} {self.reason}"


class BadRows:
    """The entries of a data set that were left out.

    ``rows`` are the first of them, ``count`` is the number of all, ``path`` names the data set; ``max_fraction`` of
    all its entries may be bad.   listing : a file that gets them all when there are too many.
    """

    def __init__(self, path, max_fraction=0.0, listing=None):
        require(0 <= max_fraction <= 1, f"max_bad_fraction is {max_fraction}; expected a share from 0 to 1")
        self.path, self.max_fraction, self.listing, self.rows, self.count = path, max_fraction, listing, [], 0

    def add(self, file, line, reason):
        """Leave out one entry."""
        self.count += 1
        if len(self.rows) < KEPT:
            reason = str(reason)
            shown = reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + "…"
            self.rows.append(BadRow(str(file), line, shown))

    def report(self, first=None):
        """``file:line: reason`` of each, or of the ``first`` few and how many more there are; "" if none."""
        shown = self.rows if first is None else self.rows[:first]
        lines = [str(row) for row in shown]
        if self.count > len(shown):
            lines.append(f"… and {self.count - len(shown)} more")
        return "\n".join(lines)

    def check(self, good):
        """FormatError if there was nothing, or more than ``max_fraction`` of all entries is bad; ``good`` are not."""
        total = good + self.count
        if total == 0:
            raise FormatError("the data set has no rows", self.path)
        if good and self.count <= self.max_fraction * total:
            return
        if self.listing is not None:
            self.save(self.listing)
        what = (f"{self.count} of {total} rows are bad, more than max_bad_fraction={self.max_fraction} allows"
                if self.count > self.max_fraction * total else f"none of the {total} rows can be used")
        where = f" (all in {self.listing})" if self.listing is not None else ""
        raise FormatError(f"{what}{where}:\n{self.report(_SHOWN)}", self.path)

    def save(self, path):
        """Write them as JSON lines: file, line, reason; the last line counts those beyond ``KEPT``."""
        lines = [json.dumps(asdict(row), ensure_ascii=False) for row in self.rows]
        if self.count > len(self.rows):
            lines.append(json.dumps({"more": self.count - len(self.rows)}))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), [(line + "\n").encode("utf-8", "backslashreplace") for line in lines])
