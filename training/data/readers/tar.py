"""Tar archives, read in place: where each member lies, and its bytes when they are asked for.

Nothing is ever extracted, so no name can lead anywhere; names that try are told apart all the same.  Only plain
archives can be read in place: ustar (POSIX.1-1988), with GNU's long names and pax headers (POSIX.1-2001).
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

from training.data.bad import Refused
from xuracore.errors import FormatError

MAX_PICTURE = 256_000_000
MAX_TEXT = 1_000_000
_BLOCK = 512
_MAX_HEADER = 65_536  # of a long name, or of a pax header
_LONG_NAME, _PAX, _FOLDER = b"L", b"x", b"5"
_SKIPPED = b"gKVM"  # headers for all members, long names of links, volumes
_SPECIAL = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
            b"S": "a sparse file"}


class Member(NamedTuple):
    """A file in an archive: where its bytes are, or as ``refused`` why it cannot be used."""

    name: str
    offset: int
    size: int
    refused: Refused | None = None


@dataclass(frozen=True)
class TarPicture:
    """A picture inside of a tar archive; ``read()`` gives its bytes."""

    path: str
    name: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.path}/{self.name}"

    def read(self):
        """The bytes.  Raises FormatError if the archive has become shorter or is gone."""
        return read_part(self.path, self.offset, self.size, self.name)


def read_part(path, offset, size, name):
    """``size`` bytes of a file from ``offset``; FormatError with the member's ``name`` if they are not there."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path, name) from error
    if len(data) < size:
        raise FormatError(f"the archive ends {size - len(data)} bytes before its end", path, name)
    return data


def members(path):
    """Every file of the archive, a Member, in order.

    Raises FormatError for what is no tar archive, a compressed one, or one with a damaged header.
    """
    try:
        total = os.stat(path).st_size
        with open(path, "rb") as file:
            yield from _members(file, path, total)
    except FileNotFoundError:
        raise FormatError("there is no such file", path) from None
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path) from error


def _members(file, path, total):
    given, at = {}, 0  # name and size that headers gave for the member to come
    while True:
        file.seek(at)
        header = file.read(_BLOCK)
        if not header or not header.strip(b"\0"):  # the end, or the zeros that announce it
            return
        _check(header, path, at)
        kind, size = header[156:157] or b"0", _number(header[124:136], path, at)
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if kind in (_LONG_NAME, _PAX):
            if size > _MAX_HEADER or start + size > total:
                raise FormatError(f"a header of {size} bytes at byte {start}; the limit is {_MAX_HEADER}", path)
            data = file.read(size)
            given.update({"path": data.rstrip(b"\0")} if kind == _LONG_NAME else _pax(data, path, start))
            continue
        if kind in _SKIPPED:
            continue
        name = given.get("path", _short_name(header)).decode("utf-8", "surrogateescape")
        if "size" in given:
            size = int(given["size"])
            at = start + -(-size // _BLOCK) * _BLOCK
        special = "a sparse file" if "sparse" in given else _SPECIAL.get(kind)
        given = {}
        if kind in b"123456":  # these have no bytes, whatever their size says
            at = start
        if kind != _FOLDER:
            yield Member(name, start, size, _fault(name, special, start + size - total))


def _fault(name, special, missing):
    """Why a member cannot be used, or None."""
    if special:
        return Refused(f"is {special}, not a file")
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return Refused("the name leads out of the archive")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return Refused("the name is not UTF-8")
    return Refused(f"the archive ends {missing} bytes before its end") if missing > 0 else None


def _short_name(header):
    name, prefix = (part.partition(b"\0")[0] for part in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _check(header, path, at):
    if len(header) < _BLOCK:
        raise FormatError(f"the archive ends inside of the header at byte {at}", path)
    stated = header[148:156].strip(b" \0")
    blank = header[:148] + b" " * 8 + header[156:]
    if not stated or not all(48 <= digit < 56 for digit in stated) or int(stated, 8) != sum(blank):
        what = f"damaged header at byte {at}" if at else "not a tar archive; a compressed one is to be unpacked first"
        raise FormatError(what, path)


def _number(field, path, at):
    """A size: octal digits, or base 256 where the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value >> 62:
            raise FormatError(f"an impossible size in the header at byte {at}", path)
        return value
    digits = field.strip(b" \0")
    if digits and not all(48 <= digit < 56 for digit in digits):
        raise FormatError(f"a size that is no number in the header at byte {at}", path)
    return int(digits or b"0", 8)


def _pax(data, path, at):
    """{"path": …, "size": …, "sparse": …} of a pax header: records "LENGTH KEY=VALUE\\n"."""
    found = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not len(length) + 3 <= int(length) <= len(data):
            raise FormatError(f"damaged pax header at byte {at}", path)
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        if key == b"path":
            found["path"] = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise FormatError(f"an impossible size in the pax header at byte {at}", path)
            found["size"] = value
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = b"1"
    return found
