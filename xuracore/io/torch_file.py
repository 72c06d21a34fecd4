"""Reader of ``pytorch_model.bin`` that unpickles nothing.

A torch file is a zip archive: ``name/data.pkl``, a pickle that describes tensors, and ``name/data/0``,
``name/data/1`` …, the raw numbers of their storages.  A pickle is a program; here its instructions are
listed by :mod:`pickletools`, which runs nothing, and those that a dictionary of tensors needs are followed
to build plain data.  No function of the file's choice is ever called: the few names a tensor is described
with are compared, everything else is refused with its byte offset.
"""

import collections
import io
import math
import os
import pickletools
import re
import stat
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from xuracore.errors import ConfigError, FormatError
from xuracore.io.bfloat16 import from_bfloat16
from xuracore.io.safetensors import HALF, MAXIMUM_DIMENSIONS, MAXIMUM_NAME, MAXIMUM_TENSORS

MAXIMUM_PICKLE_BYTES = 64 * 2**20
MAXIMUM_INSTRUCTIONS = 4_000_000
MAXIMUM_DIRECTORY_BYTES = 16 * 2**20  # of the zip archive's table of contents
MAXIMUM_ENTRIES = 2 * MAXIMUM_TENSORS

_STORAGES = {  # torch's storage class: the format's dtype name, and the element on disk
    "DoubleStorage": ("F64", "<f8"),
    "FloatStorage": ("F32", "<f4"),
    "HalfStorage": ("F16", "<f2"),
    "BFloat16Storage": ("BF16", "<u2"),
    "LongStorage": ("I64", "<i8"),
    "IntStorage": ("I32", "<i4"),
    "ShortStorage": ("I16", "<i2"),
    "CharStorage": ("I8", "i1"),
    "ByteStorage": ("U8", "u1"),
    "BoolStorage": ("BOOL", "?"),
}
_TENSOR, _PARAMETER = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
_DICTIONARY = ("collections", "OrderedDict")
_NAMES = {_TENSOR, _PARAMETER, _DICTIONARY} | {("torch", name) for name in _STORAGES}
_MARK = object()
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin


class _Name(NamedTuple):
    """A name of _NAMES, never the thing it names."""

    module: str
    name: str


class _Storage(NamedTuple):
    dtype: str
    element: np.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple  # in elements


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
            self._tensors = _tensors(self._bytes(entry).tobytes(), self.path, entry)
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
        stream.seek(info.header_offset)
        local = stream.read(30)
        if info.header_offset < ends or len(local) < 30 or not local.startswith(b"PK\x03\x04"):
            raise FormatError("overlaps another entry, or has no header of its own", path, entry)
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


# --- the pickle ----------------------------------------------------------------------------------


def _tensors(data, path, entry):
    """{name: :class:`_Tensor`} from the bytes of data.pkl."""
    result = _Reader(path, entry).run(data)
    if not isinstance(result, dict):
        raise FormatError("does not describe a dictionary of tensors", path, entry)
    if len(result) > MAXIMUM_TENSORS:
        raise FormatError(f"has {len(result)} tensors; at most {MAXIMUM_TENSORS}", path, entry)
    for name, value in result.items():
        if not name or len(name) > MAXIMUM_NAME or _FORBIDDEN.search(name):
            raise FormatError("a tensor's name is empty, too long or holds control characters", path, name[:80])
        if not isinstance(value, _Tensor):
            reason = "is not a tensor; expected a state dict, as torch.save(model.state_dict(), …) writes it"
            raise FormatError(reason, path, name)
    return result


class _Reader:
    """Follows the instructions of a pickle over a stack of plain data."""

    def __init__(self, path, entry):
        self.path, self.entry, self.offset = path, entry, 0
        self.stack, self.memo = [], {}

    def refuse(self, reason):
        raise FormatError(f"{reason} (byte {self.offset})", self.path, self.entry)

    def run(self, data):
        """What the pickle describes."""
        try:
            for count, (code, argument, offset) in enumerate(pickletools.genops(io.BytesIO(data))):
                self.offset = offset
                if count >= MAXIMUM_INSTRUCTIONS:
                    self.refuse(f"has more than {MAXIMUM_INSTRUCTIONS} instructions")
                if code.name == "STOP":
                    if len(self.stack) != 1:
                        self.refuse("ends with other than one value")
                    if offset + 1 != len(data):
                        self.refuse(f"ends before its last {len(data) - offset - 1} bytes")
                    return self.pop()
                self.step(code.name, argument)
        except (ValueError, OverflowError, UnicodeError) as error:  # of genops, for bytes that are no pickle
            if isinstance(error, FormatError):
                raise
            self.refuse(f"is not a pickle: {str(error)[:120]}")
        return self.refuse("has no end")

    def step(self, code, argument):
        """One instruction."""
        if code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _VALUES:
            self.stack.append(argument)
        elif code in _PASSED_OVER:
            pass
        elif code in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif code in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                self.refuse(f"recalls entry {argument}, which was never kept")
            self.stack.append(self.memo[argument])
        elif code in _FOLLOWED:
            _FOLLOWED[code](self, argument)
        else:
            self.refuse(f"instruction {code} is refused: a dictionary of tensors needs none of it")

    # ------------------------------------------------------------------ the stack
    def top(self):
        if not self.stack or self.stack[-1] is _MARK:
            self.refuse("takes a value from an empty stack")
        return self.stack[-1]

    def pop(self, kind=object):
        value = self.top()
        if not isinstance(value, kind):
            self.refuse(f"a {type(value).__name__.strip('_')} stands where another kind of value must")
        return self.stack.pop()

    def pop_to_mark(self):
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        return self.refuse("has no mark to go back to")

    # ------------------------------------------------------------------ instructions
    def mark(self, _):
        self.stack.append(_MARK)

    def empty_dict(self, _):
        self.stack.append({})

    def empty_list(self, _):
        self.stack.append([])

    def tuple_of_mark(self, _):
        self.stack.append(tuple(self.pop_to_mark()))

    def tuple_of(self, count):
        self.stack.append(tuple([self.pop() for _ in range(count)][::-1]))

    def set_items(self, values):
        if len(values) % 2:
            self.refuse("a key has no value")
        target = self.top()
        if not isinstance(target, dict):
            self.refuse("sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2]):
            if not isinstance(key, str):
                self.refuse(f"a key is a {type(key).__name__.strip('_')}; expected a string")
            if key in target:
                self.refuse(f"the key {key!r:.80} comes twice")
            target[key] = value

    def append(self, values):
        target = self.top()
        if not isinstance(target, list):
            self.refuse("appends to what is no list")
        target.extend(values)

    def name(self, argument):
        module, _, name = argument.partition(" ")
        self.push_name(module, name)

    def name_from_stack(self, _):
        name, module = self.pop(str), self.pop(str)
        self.push_name(module, name)

    def push_name(self, module, name):
        if (module, name) not in _NAMES:
            self.refuse(f"the name {f'{module}.{name}'!r:.80} is refused: no tensor is described with it")
        self.stack.append(_Name(module, name))

    def persistent(self, _):
        """("storage", class, key, place, count): the storage is named, not read."""
        value = self.pop(tuple)
        if len(value) != 5 or value[0] != "storage" or not isinstance(value[0], str):
            self.refuse("a reference is not to a storage")
        _, kind, key, place, count = value
        if not isinstance(kind, _Name) or kind.module != "torch":
            self.refuse("the type of a storage is not named")
        if type(key) is not str or not re.fullmatch(r"[0-9]{1,9}", key) or type(place) is not str:
            self.refuse("the key of a storage is not a number")
        if type(count) is not int or not 0 <= count < 2**48:
            self.refuse("the size of a storage is out of range")
        dtype, element = _STORAGES[kind.name]
        self.stack.append(_Storage(dtype, np.dtype(element), key, count))

    def reduce(self, _):
        """Not a call: the three names that can stand here are described in place."""
        arguments, name = self.pop(tuple), self.pop(_Name)
        if name == _DICTIONARY:
            if arguments not in ((), ([],)):
                self.refuse("an OrderedDict is made of other than nothing")
            self.stack.append({})
        elif name == _TENSOR:
            self.stack.append(self.tensor(arguments))
        elif name == _PARAMETER:
            if not arguments or not isinstance(arguments[0], _Tensor):
                self.refuse("a parameter is made of no tensor")
            self.stack.append(arguments[0])
        else:
            self.refuse(f"{name.name} is called")

    def tensor(self, arguments):
        """(storage, offset, shape, strides, requires_grad, hooks[, metadata]), all inside the storage."""
        if len(arguments) not in (6, 7):
            self.refuse(f"a tensor is described by {len(arguments)} values; expected 6")
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage):
            self.refuse("a tensor has no storage")
        for what, numbers in (("shape", shape), ("strides", strides)):
            if not isinstance(numbers, tuple) or len(numbers) > MAXIMUM_DIMENSIONS:
                self.refuse(f"the {what} of a tensor are not a tuple of at most {MAXIMUM_DIMENSIONS}")
            if not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
                self.refuse(f"a number in the {what} of a tensor is negative, too large, or not whole")
        if len(shape) != len(strides):
            self.refuse(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
        if type(offset) is not int or not 0 <= offset <= storage.count:
            self.refuse("the offset of a tensor is outside its storage")
        size = math.prod(shape)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides)) if size else offset - 1
        if last >= storage.count or size > storage.count:
            self.refuse(f"a tensor of {size} numbers reaches {last + 1} of the {storage.count} of its storage")
        return _Tensor(storage, offset, shape, strides)

    def build(self, _):
        """The attributes of a dictionary (torch keeps version numbers there) are dropped."""
        self.pop(dict)
        if not isinstance(self.top(), dict):
            self.refuse("sets attributes of what is no dictionary")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_PASSED_OVER = {"PROTO", "FRAME"}
_FOLLOWED = {
    "MARK": _Reader.mark,
    "EMPTY_DICT": _Reader.empty_dict,
    "EMPTY_LIST": _Reader.empty_list,
    "TUPLE": _Reader.tuple_of_mark,
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "SETITEM": lambda reader, _: reader.set_items([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
    "APPEND": lambda reader, _: reader.append([reader.pop()]),
    "APPENDS": lambda reader, _: reader.append(reader.pop_to_mark()),
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": _Reader.name_from_stack,
    "BINPERSID": _Reader.persistent,
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
}
