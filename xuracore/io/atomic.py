"""Files that are the old one or the new one, never half of each.

A file is written under a temporary name in the same folder, flushed to the disk, read back and
compared, and only then renamed over the old one; last, the folder itself is flushed, so that the
rename survives a power cut.  A writer that is killed leaves the old file whole and a temporary file
behind, which a later save sweeps away.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from typing import NamedTuple

from xuracore.errors import FormatError

STALE_SECONDS = 3600.0  # a temporary file untouched for this long has lost its writer

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.xura-tmp")


class Written(NamedTuple):
    """Size and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


def write_atomically(path, chunks, check=None):
    """Write ``chunks`` (bytes-like, one after the other) to ``path`` and return its :class:`Written`.

    check : called with the temporary path after the bytes were read back; what it raises is raised
        here, and ``path`` stays as it was.  So it does after any other failure up to the rename.

    A symbolic link is followed: the file that it points to is replaced.  Raises the ``OSError`` of
    the system (disk full, no permission, no such folder), or FormatError if the bytes on the disk
    differ from those written.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "cannot write a file here, this is a folder", target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "the folder to write into does not exist", folder)
    sweep_stale(folder)
    temporary = temporary_path(target)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o644)
    try:
        try:
            written = _write_all(descriptor, chunks)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if digest_file(temporary) != written:
            raise FormatError("what the disk returns differs from what was written", target)
        if check is not None:
            check(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)
    return written


def _write_all(descriptor, chunks):
    digest, total = hashlib.sha256(), 0
    for chunk in chunks:
        rest = memoryview(chunk)
        digest.update(rest)
        total += rest.nbytes
        while rest.nbytes:  # the system may take less than it is offered
            rest = rest[os.write(descriptor, rest) :]
    return Written(total, digest.hexdigest())


def digest_file(path):
    """Size and SHA-256 of the file at ``path``."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Written(file.tell(), digest.hexdigest())


def temporary_path(target):
    """A fresh hidden name beside ``target`` that :func:`sweep_stale` recognises."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{os.getpid()}.{secrets.token_hex(4)}.xura-tmp")


def sweep_stale(folder):
    """Remove our own temporary files and folders that no writer has touched for an hour."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # another process may sweep at the same time
                if time.time() - entry.stat(follow_symlinks=False).st_mtime < STALE_SECONDS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)


def sync_folder(folder):
    """Flush the entries of ``folder``, so that a rename in it survives a power cut."""
    if os.name == "nt":  # Windows cannot open a folder for this
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
