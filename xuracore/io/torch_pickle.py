"""The pickle in a torch file, followed without unpickling: plain descriptions of tensors come out.

:mod:`pickletools` lists the instructions and runs nothing.  Those that a dictionary of tensors needs build
plain data here; the few names a tensor is described with are compared, never looked up; anything else is a
FormatError with its byte offset.
"""

import io
import math
import pickletools
import re
from typing import NamedTuple

import numpy as np

from xuracore.errors import FormatError
from xuracore.io.safetensors import MAXIMUM_DIMENSIONS, MAXIMUM_NAME, MAXIMUM_TENSORS

MAXIMUM_INSTRUCTIONS = 4_000_000

STORAGES = {  # torch's storage class: the format's dtype name, and the element on disk
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
_NAMES = {_TENSOR, _PARAMETER, _DICTIONARY} | {("torch", name) for name in STORAGES}
_MARK = object()
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class _Name(NamedTuple):
    """A name of _NAMES, never the thing it names."""

    module: str
    name: str


class Storage(NamedTuple):
    """One run of numbers of the file, named by its key: ``count`` elements."""

    dtype: str
    element: np.dtype
    key: str
    count: int


class Tensor(NamedTuple):
    """A view into a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple


def tensors_of(data, path, entry):
    """{name: :class:`Tensor`} from the bytes of data.pkl."""
    result = _Reader(path, entry).run(data)
    if not isinstance(result, dict):
        raise FormatError("does not describe a dictionary of tensors", path, entry)
    if len(result) > MAXIMUM_TENSORS:
        raise FormatError(f"has {len(result)} tensors; at most {MAXIMUM_TENSORS}", path, entry)
    for name, value in result.items():
        if not name or len(name) > MAXIMUM_NAME or _FORBIDDEN.search(name):
            raise FormatError("a tensor's name is empty, too long or holds control characters", path, name[:80])
        if not isinstance(value, Tensor):
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
        dtype, element = STORAGES[kind.name]
        self.stack.append(Storage(dtype, np.dtype(element), key, count))

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
            if not arguments or not isinstance(arguments[0], Tensor):
                self.refuse("a parameter is made of no tensor")
            self.stack.append(arguments[0])
        else:
            self.refuse(f"{name.name} is called")

    def tensor(self, arguments):
        """(storage, offset, shape, strides, requires_grad, hooks[, metadata]), all inside the storage."""
        if len(arguments) not in (6, 7):
            self.refuse(f"a tensor is described by {len(arguments)} values; expected 6")
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage):
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
        return Tensor(storage, offset, shape, strides)

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
