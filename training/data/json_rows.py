"""JSON of other people, entry by entry: an odd one is refused alone, and no file is held in memory.

The documents of COCO, VQAv2, LLaVA and CLEVR are arrays of hundreds of thousands of small objects.  ``elements``
walks through one; what does not belong there (NaN, a key twice, a number that no float holds) is the fault of one
element, and a document that is no JSON ends with its line.
"""

import json
import math
from collections import Counter

from training.data.bad import Refused
from xuracore.errors import FormatError

MAX_ELEMENT = 16_000_000  # characters of one element of an array
_CHUNK = 1 << 20
_SPACE = " \t\r\n"


class Decoder:
    """``decoder.decode(text)`` and ``decoder.raw(text, start)`` → value; Refused for a value that is odd."""

    def __init__(self):
        self._fault = None
        hooks = {"object_pairs_hook": self._unique, "parse_float": self._finite, "parse_constant": self._constant}
        self._decoder = json.JSONDecoder(**hooks)
        self._lenient = json.JSONDecoder(**hooks, parse_int=self._no_integer)

    def decode(self, text):
        """The value of a whole text.  Raises Refused also for what is no JSON."""
        try:
            return self._checked(self._decoder.decode, text)
        except json.JSONDecodeError as error:
            raise Refused(f"not JSON: {error.msg} (column {error.colno})") from None
        except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
            raise Refused(f"not acceptable JSON: {str(error)[:120]}") from None

    def raw(self, text, start):
        """(value, where it ends); the value is a Refused where it is odd.  Raises JSONDecodeError, RecursionError."""
        self._fault = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of too many digits
            value, end = self._lenient.raw_decode(text, start)
        return (value if self._fault is None else self._fault), end

    def _checked(self, function, text):
        self._fault = None
        value = function(text)
        if self._fault is not None:
            raise self._fault
        return value

    def _unique(self, pairs):
        value = dict(pairs)
        if len(value) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            self._fault = Refused(f"the key {twice[:80]!r} appears twice in one object")
        return value

    def _finite(self, number):
        value = float(number)
        if not math.isfinite(value):
            self._fault = Refused(f"the number {number[:40]} is not finite")
        return value

    def _constant(self, name):
        self._fault = Refused(f"{name} is not JSON")

    def _no_integer(self, digits):
        if len(digits) > 4300:  # Python's limit
            self._fault = Refused(f"a number of {len(digits)} digits")
        return 0


def elements(path):
    """(key, line, value) of each element of the arrays that a document holds; lines count from 1.

    The document is an array (key None), or an object: its arrays give one entry per element, other values come
    whole.  A value that is odd comes as a Refused.  Raises FormatError, with the line, for what is no such document.
    """
    with _Text(path) as text:
        opening = text.peek()
        if opening == "[":
            yield from _array(text, None)
        elif opening == "{":
            yield from _object(text)
        else:
            text.fail("expected a JSON array or object")
        if text.peek():
            text.fail("something follows the JSON document")


def _object(text):
    text.take("{")
    if text.peek() == "}":
        text.take("}")
        return
    while True:
        _, key = text.value()
        if not isinstance(key, str):
            text.fail("expected a key in quotes")
        text.take(":")
        if text.peek() == "[":
            yield from _array(text, key)
        else:
            yield (key, *text.value())
        if text.take(",}") == "}":
            return


def _array(text, key):
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield (key, *text.value())
        if text.take(",]") == "]":
            return


class _Text:
    """A window on a text file: whole values from its start, and the line where they begin."""

    def __init__(self, path):
        self._path, self._decoder = path, Decoder()
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def __enter__(self):
        try:
            self._file = open(self._path, encoding="utf-8-sig", newline="")
        except FileNotFoundError:
            raise FormatError("there is no such file", self._path) from None
        except OSError as error:
            raise FormatError(f"cannot be read ({error.strerror})", self._path) from error
        return self

    def __exit__(self, *_):
        self._file.close()

    def fail(self, reason):
        raise FormatError(reason, f"{self._path}:{self._line}")

    def _more(self, size=_CHUNK):
        """Read on, forgetting what was consumed."""
        try:
            chunk = self._file.read(size)
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8 ({error.reason}), in this line or after it")
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        self._ended = len(chunk) < size

    def _advance(self, end):
        self._line += self._buffer.count("\n", self._at, end)
        self._at = end

    def peek(self):
        """The next character that is no space, or "" at the end."""
        while True:
            at = self._at
            while at < len(self._buffer) and self._buffer[at] in _SPACE:
                at += 1
            self._advance(at)
            if at < len(self._buffer):
                return self._buffer[at]
            if self._ended:
                return ""
            self._more()

    def take(self, allowed):
        """The next character, which must be one of ``allowed``."""
        found = self.peek()
        if not found or found not in allowed:
            self.fail(f"not JSON: expected {' or '.join(allowed)}, found {found or 'the end'}")
        self._advance(self._at + 1)
        return found

    def value(self):
        """(line, value) of what comes next."""
        self.peek()
        line = self._line
        while True:
            try:
                value, end = self._decoder.raw(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # else a number might go on
                    self._advance(end)
                    return line, value
            except json.JSONDecodeError as error:
                if self._ended:
                    self.fail(f"not JSON: {error.msg}")
            except RecursionError:
                self.fail("nests too deep")
            held = len(self._buffer) - self._at
            if held > MAX_ELEMENT:
                self.fail(f"not JSON, or one value of more than {MAX_ELEMENT:,} characters")
            self._more(max(_CHUNK, held))
