"""Reader of ``pytorch_model.bin`` that unpickles nothing.

A torch file is a zip archive: ``name/data.pkl``, a pickle that describes tensors, and ``name/data/0``,
``name/data/1`` …, the raw numbers of their storages.  A pickle is a program; here no function of the file's
choice is ever called (see :mod:`xuracore.io.torch_pickle`), and every size is checked before it is used.
"""

import collections
import os
import re
import stat
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from xuracore.errors import ConfigError, FormatError
from xuracore.io.bfloat16 import from_bfloat16
from xuracore.io.safetensors import HALF, MAXIMUM_NAME, MAXIMUM_TENSORS
from xuracore.io.torch_pickle import tensors_of

MAXIMUM_PICKLE_BYTES = 64 * 2**20
MAXIMUM_DIRECTORY_BYTES = 16 * 2**20  # of the zip archive's table of contents
MAXIMUM_ENTRIES = 2 * MAXIMUM_TENSORS

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin


class _Span(NamedTuple):
    """Where the bytes of a zip entry lie."""

    start: int
    bytes: int
    crc: int


def open_torch_file(path):
    """Open a ``pytorch_model.bin`` (a state dict saved by torch ≥ 1.6) without reading any tensor.

    Returns a :class:`TorchFile`.  Raises FormatError for whatever is not a plain dictionary of tensors,
    naming the byte of the instruction that is refused, OSError if the file cannot be read.
    """
    return TorchFile(path)


class TorchFile:
    """The tensors of a torch file, each read when it is asked for; as SafetensorsFile.

    The file is described whole, and every size, stride and storage checked, before the constructor returns.
    """

    def __init__(self, path):
        self.path = str(path)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError("is not a regular file", self.path)
        self._stream = open(path, "rb")
        try:
            root, self._spans = _read_archive(self._stream, self.path)
            self._data = f"{root}/data/"
            entry = f"{root}/data.pkl"
            if self._spans[entry].bytes > MAXIMUM_PICKLE_BYTES:
                raise FormatError(f"is larger than {MAXIMUM_PICKLE_BYTES} bytes", self.path, entry)
            self._tensors = tensors_of(self._bytes(entry).tobytes(), self.path, entry)
            self._check_storages()
            self._users = collections.Counter(tensor.storage.key for tensor in self._tensors.values())
            self._shared = None, None  # key and bytes
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file.  Arrays that were read stay valid."""
        self._stream.close()

    def keys(self):
        """Names of all tensors, in the order of the file."""
        return self._tensors.keys()

    def __contains__(self, name):
        return name in self._tensors

    def __len__(self):
        return len(self._tensors)

    def shape(self, name):
        """Shape of the tensor ``name``, a tuple."""
        return self._tensor(name).shape

    def dtype(self, name):
        """The name safetensors gives its dtype: ``"F32"``, ``"BF16"`` …"""
        return self._tensor(name).storage.dtype

    def read(self, name, half="float32"):
        """The tensor ``name`` as a C-contiguous ndarray of its own.

        half : what F16 and BF16 become, see :data:`xuracore.io.safetensors.HALF`.
        Raises FormatError if there is no such tensor or the file is damaged, ConfigError for another
        ``half``.
        """
        if half not in HALF:
            raise ConfigError(f"half is {half!r}; expected one of {', '.join(map(repr, HALF))}")
        storage, offset, shape, strides = self._tensor(name)
        flat = self._storage_bytes(storage.key).view(storage.element)
        if storage.dtype == "BOOL" and flat.size and flat.view(np.uint8).max() > 1:
            raise FormatError("holds a boolean that is neither 0 nor 1", self.path, name)
        steps = tuple(stride * storage.element.itemsize for stride in strides)
        array = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps)
        if storage.dtype == "BF16" and half != "bits":
            return from_bfloat16(np.ascontiguousarray(array)).reshape(shape)
        wide = storage.dtype == "F16" and half == "float32"
        element = np.dtype(np.float32) if wide else storage.element.newbyteorder("=")
        return np.array(array, element, order="C", copy=None if self._users[storage.key] == 1 else True)

    def _tensor(self, name):
        if name not in self._tensors:
            raise FormatError(f"holds no tensor named {name!r}", self.path)
        return self._tensors[name]

    def _storage_bytes(self, key):
        """The bytes of a storage; one that several tensors share is kept until another is asked for."""
        if self._users[key] == 1:
            return self._bytes(self._data + key)
        if self._shared[0] != key:
            self._shared = key, self._bytes(self._data + key)
        return self._shared[1]

    def _bytes(self, entry):
        """The bytes of a zip entry, checked against its CRC-32."""
        span = self._spans[entry]
        flat = np.empty(span.bytes, np.uint8)
        self._stream.seek(span.start)
        if self._stream.readinto(flat) != span.bytes:
            raise FormatError("the file became shorter while it was read", self.path, entry)
        if zlib.crc32(flat) != span.crc:
            raise FormatError("its checksum does not match: the file is damaged", self.path, entry)
        return flat

    def _check_storages(self):
        for name, tensor in self._tensors.items():
            storage = tensor.storage
            span = self._spans.get(self._data + storage.key)
            if span is None:
                raise FormatError(f"its storage {storage.key!r:.40} is not in the file", self.path, name)
            expected = storage.count * storage.element.itemsize
            if span.bytes != expected:
                reason = f"its storage has {span.bytes} bytes; {storage.count} × {storage.dtype} take {expected}"
                raise FormatError(reason, self.path, name)


# --- the archive ---------------------------------------------------------------------------------


def _read_archive(stream, path):
    """(root folder, {entry: :class:`_Span`}), where every span lies in the file and none overlap."""
    size = os.fstat(stream.fileno()).st_size
    beginning = stream.read(32)
    if beginning.startswith(_OLD_MAGIC):
        raise FormatError(
            "is in the format of torch before 1.6, a bare pickle; load it with torch, save it again", path
        )
    if not beginning.startswith(b"PK\x03\x04"):
        raise FormatError("is not a torch file: it does not begin as a zip archive does", path)
    _check_directory(stream, size, path)
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, IndexError) as error:
        raise FormatError(f"is not a whole zip archive ({error}); was it truncated?", path) from None
    if len(infos) > MAXIMUM_ENTRIES:
        raise FormatError(f"has {len(infos)} entries; at most {MAXIMUM_ENTRIES}", path)
    spans, ends = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = info.filename
        _check_entry(info, entry in spans, path)
        if not ends <= info.header_offset <= size:  # a damaged table of contents also gives negative ones
            raise FormatError("overlaps another entry, or lies outside the file", path, entry)
        stream.seek(info.header_offset)
        local = stream.read(30)
        if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
            raise FormatError("has no header of its own", path, entry)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        ends = start + info.file_size
        if ends > size:
            raise FormatError("ends behind the end of the file", path, entry)
        spans[entry] = _Span(start, info.file_size, info.CRC)
    roots = [entry.removesuffix("/data.pkl") for entry in spans if entry.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise FormatError("holds no single folder with data.pkl, so torch did not write it", path)
    root = roots[0]
    if f"{root}/constants.pkl" in spans:
        raise FormatError("is a TorchScript program, not weights alone", path)
    order = spans.get(f"{root}/byteorder")
    if order is not None:
        stream.seek(order.start)
        if stream.read(min(order.bytes, 16)) != b"little":
            raise FormatError("its numbers are not little-endian", path, f"{root}/byteorder")
    return root, spans


def _check_directory(stream, size, path):
    """The table of contents takes many times its bytes in memory, so its size is looked at first."""
    stream.seek(max(0, size - 2**16 - 128))
    tail = stream.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    if not 0 <= end <= len(tail) - 22:
        raise FormatError("is not a whole zip archive: it has no table of contents; was it truncated?", path)
    claimed = struct.unpack("<I", tail[end + 12 : end + 16])[0]
    if 0 <= end64 <= len(tail) - 56:
        claimed = max(claimed % 0xFFFFFFFF, struct.unpack("<Q", tail[end64 + 40 : end64 + 48])[0])
    if claimed > MAXIMUM_DIRECTORY_BYTES:
        raise FormatError(f"its table of contents claims {claimed} bytes; at most {MAXIMUM_DIRECTORY_BYTES}", path)


def _check_entry(info, twice, path):
    entry = info.filename
    if not entry or len(entry) > MAXIMUM_NAME or _FORBIDDEN.search(entry):
        raise FormatError("an entry's name is empty, too long or holds control characters", path, entry[:80])
    if twice:
        raise FormatError("appears twice in the archive", path, entry)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError("is compressed; torch stores its entries as they are", path, entry)
    if info.flag_bits & 0x41:
        raise FormatError("is encrypted", path, entry)
