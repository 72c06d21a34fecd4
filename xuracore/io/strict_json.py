"""JSON that is bounded and means one thing: for every document read from a file.

Python's ``json`` takes the last of two equal keys, accepts NaN and Infinity, guesses UTF-16, and
lets a small file nest a million levels.  Here each of these is a :class:`~xuracore.errors.FormatError`
that names the file, found before or while the document is built.
"""

import collections
import json
import math
import re

from xuracore.errors import FormatError
from xuracore.io.atomic import write_atomically

MAXIMUM_BYTES = 16 * 2**20
MAXIMUM_DEPTH = 64
MAXIMUM_CONTAINERS = 1_000_000  # a list of empty lists takes twenty times its text in memory
MAXIMUM_INTEGER_BITS = 4096  # well below the digits at which Python refuses to convert

# A string (closed or not) or one bracket; possessive, so that the scan is linear in the text.
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(data, path=None, *, maximum_depth=MAXIMUM_DEPTH, allow_floats=True, allow_infinity=False):
    """The value of the JSON document ``data`` (bytes, UTF-8).

    maximum_depth : levels of lists and objects; the outermost is the first.
    allow_floats : False refuses every number that is not written as an integer.
    allow_infinity : True takes the bare words Infinity and -Infinity, which some configurations of
        models hold although JSON has no such numbers.
    path : named in errors.

    Raises FormatError: not UTF-8 or not JSON, too deep, a key twice in one object, NaN or infinity
    (also a number too large for float64), an unpaired surrogate in a string.
    """
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 text ({error.reason} at byte {error.start})", path) from None
    _check_structure(text, path, maximum_depth)

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise FormatError("appears twice in one object", path, key[:80])
        return result

    def finite(number):
        if not allow_floats:
            raise FormatError(f"the number {number[:40]} is not an integer", path)
        value = float(number)
        if not math.isfinite(value):
            raise FormatError(f"the number {number[:40]} is too large", path)
        return value

    def constant(name):
        if allow_infinity and name != "NaN":
            return float(name)
        raise FormatError(f"{name} is not a JSON number", path)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except FormatError:
        raise
    except ValueError as error:  # a syntax error, or an integer of thousands of digits
        raise FormatError(f"is not valid JSON: {error}", path) from None
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise FormatError("a string holds half a surrogate pair", path)
    return value


def _check_structure(text, path, maximum_depth):
    depth = containers = 0
    for match in _STRUCTURE.finditer(text):
        character = match.group()[0]
        if character in "[{":
            depth += 1
            containers += 1
            if depth > maximum_depth:
                raise FormatError(f"nests deeper than {maximum_depth} levels", path)
            if containers > MAXIMUM_CONTAINERS:
                raise FormatError(f"has more than {MAXIMUM_CONTAINERS} lists and objects", path)
        elif character in "]}":
            depth -= 1


def load_json(path, *, maximum_bytes=MAXIMUM_BYTES, maximum_depth=MAXIMUM_DEPTH, allow_infinity=False):
    """The value of the JSON file at ``path``; see :func:`parse_json` for what is refused.

    Raises FormatError also when the file is larger than ``maximum_bytes``, OSError when it cannot
    be read.
    """
    with open(path, "rb") as file:
        data = file.read(maximum_bytes + 1)
    if len(data) > maximum_bytes:
        raise FormatError(f"is larger than {maximum_bytes} bytes", path)
    return parse_json(data, path, maximum_depth=maximum_depth, allow_infinity=allow_infinity)


def save_json(path, value):
    """Write ``value`` to ``path`` as indented JSON, atomically; return its size and SHA-256.

    ``value`` consists of dict (keys are str), list or tuple, str, int, finite float, bool and None.
    Raises FormatError naming the place of anything else, so that what was saved can be loaded.
    """
    _check_value(value, path, "$", 0)
    data = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    if len(data) > MAXIMUM_BYTES:
        raise FormatError(f"would be larger than {MAXIMUM_BYTES} bytes", path)
    return write_atomically(path, [data], check=load_json)


def _check_value(value, path, place, depth):
    if isinstance(value, (dict, list, tuple)) and depth >= MAXIMUM_DEPTH:
        raise FormatError(f"nests deeper than {MAXIMUM_DEPTH} levels", path, place)
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise FormatError(f"key {key!r} is a {type(key).__name__}; expected str", path, place)
            _check_text(key, path, place)
            _check_value(item, path, f"{place}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_value(item, path, f"{place}[{index}]", depth + 1)
    elif type(value) is str:
        _check_text(value, path, place)
    elif type(value) is float:
        if not math.isfinite(value):
            raise FormatError(f"is {value}, which JSON cannot hold", path, place)
    elif type(value) is int:
        if value.bit_length() > MAXIMUM_INTEGER_BITS:
            raise FormatError(f"is an integer of more than {MAXIMUM_INTEGER_BITS} bits", path, place)
    elif value is not None and type(value) is not bool:
        raise FormatError(f"is a {type(value).__name__}, which JSON cannot hold", path, place)


def _check_text(text, path, place):
    if _SURROGATE.search(text):
        raise FormatError("a string holds half a surrogate pair", path, place)
