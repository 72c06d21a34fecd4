"""Records of the visual memory: bytes that show whether they are whole.

    b"XuRe"   u32 length   u32 CRC-32 of (length, payload)   payload        (little-endian)
    payload = u32 length of JSON   JSON   data

Nothing in a record is believed before its checksum and its JSON fit.
"""

import json
import struct
import zlib

from xuracore.errors import FormatError, ShapeError

MARK = b"XuRe"
MAX_RECORD = 2**20  # bytes of a payload
MAX_NUMBER = 10**12  # of records in the life of a memory
MAX_RESCUES = 64  # marks that are tried behind damage: a file made of marks must not take for ever
HEAD = struct.Struct("<4sII")


class TooDamaged(FormatError):
    """A file holds more damaged records than will be looked into."""


def encode(about, data):
    """The bytes of a record: ``about`` is a JSON object, ``data`` bytes.  ShapeError if it is too large."""
    text = json.dumps(about, allow_nan=False, separators=(",", ":")).encode()
    payload = struct.pack("<I", len(text)) + text + data
    if len(payload) > MAX_RECORD:
        raise ShapeError(f"a record has at most {MAX_RECORD} bytes, not {len(payload)}: shrink the picture")
    return HEAD.pack(MARK, len(payload), _checksum(payload)) + payload


def decode(content, offset=0):
    """(about, data, offset behind it) of the record at ``offset``, or None where there is no whole one."""
    claimed = _claimed(content, offset)
    if claimed is None:
        return None
    start, length, checksum = claimed
    payload = content[start : start + length]
    if _checksum(payload) != checksum:
        return None
    text = struct.unpack_from("<I", payload)[0]
    try:
        about = json.loads(payload[4 : 4 + text])
    except (ValueError, RecursionError):
        return None
    return (about, payload[4 + text :], start + length) if _is_sound(about) else None


def scan(content):
    """(offset, about, data, offset behind it) of every whole record; damaged ones are passed over.

    Raises TooDamaged where so much is damaged that looking on could take for ever.
    """
    offset, rescues = 0, 0
    while 0 <= offset < len(content):
        record = decode(content, offset)
        if record is not None:
            yield offset, *record
            offset = record[2]
            continue
        rescues += _claimed(content, offset) is not None
        if rescues > MAX_RESCUES:
            raise TooDamaged(f"more than {MAX_RESCUES} records are damaged")
        offset = content.find(MARK, offset + 1)


def _claimed(content, offset):
    """(first byte, length, checksum) of the payload that a record at ``offset`` claims, or None."""
    if len(content) - offset < HEAD.size:
        return None
    mark, length, checksum = HEAD.unpack_from(content, offset)
    start = offset + HEAD.size
    fits = mark == MARK and 4 <= length <= min(MAX_RECORD, len(content) - start)
    return (start, length, checksum) if fits else None


def _checksum(payload):
    return zlib.crc32(payload, zlib.crc32(struct.pack("<I", len(payload))))


def _is_sound(about):
    if not isinstance(about, dict):
        return False
    numbers = [about.get("number"), about.get("again", 0), about.get("version"), about.get("width")]
    if not all(type(n) is int and 0 <= n < MAX_NUMBER for n in numbers):
        return False
    when, sure = about.get("time"), about.get("confidence")
    if type(when) not in (int, float) or not abs(when) < 1e15:  # so neither NaN nor Infinity
        return False
    if not isinstance(about.get("source"), str) or not isinstance(about.get("eyes"), str):
        return False
    if "again" in about:
        return True
    certain = sure is None or type(sure) in (int, float) and 0 <= sure <= 1
    return certain and isinstance(about.get("question"), str) and isinstance(about.get("answer"), str)
