"""Reader and writer of safetensors files: named arrays, one flat buffer, no code.

Format (https://huggingface.co/docs/safetensors): the length of the header as a little-endian
unsigned 64-bit integer; the header, a JSON object ``{name: {"dtype", "shape", "data_offsets"}}``
with an optional ``"__metadata__"`` of strings; then the bytes of all tensors, C order,
little-endian, without holes or overlap.

Nothing in a file is believed: the header is checked whole before a byte of data is read or an array
is allocated, and every violation is a FormatError that names the file and the entry.
"""

import json
import math
import mmap as memory_map
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuracore.io.atomic import write_atomically
from xuracore.io.bfloat16 import from_bfloat16
from xuracore.io.strict_json import load_json, parse_json

MAXIMUM_HEADER_BYTES = 16 * 2**20
MAXIMUM_TENSORS = 100_000
MAXIMUM_NAME = 512
MAXIMUM_DIMENSIONS = 8
MAXIMUM_DIMENSION = 2**40 - 1  # of one axis: an empty tensor must not claim an absurd shape either
MAXIMUM_ELEMENTS = 2**48 - 1

_ELEMENTS = {  # what a dtype of the format is on disk
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
HALF = {
    "native": "F16 stays float16; BF16, which NumPy lacks, becomes float32",
    "float32": "both become float32 (every value of either is one of float32)",
    "bits": "F16 stays float16; BF16 stays 16 bits a number, as uint16 (see from_bfloat16)",
}
_NAMES = {element: name for name, element in _ELEMENTS.items() if name != "BF16"}
_METADATA = "__metadata__"
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Entry(NamedTuple):
    """One tensor of a file: its format dtype, shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple
    start: int
    bytes: int
    path: str


class Header(NamedTuple):
    """``tensors``: name → :class:`Entry`; ``metadata``: str → str."""

    tensors: dict
    metadata: dict


def load_safetensors(path, names=None, *, mmap=False, half="native"):
    """Read named arrays: dict name → ndarray.

    path : a ``.safetensors`` file, a ``.safetensors.index.json`` that spreads tensors over several
        files, or a model folder that holds ``model.safetensors`` or its index.
    names : read only these (an iterable of names, or one name).
    mmap : map the file instead of copying it.  The arrays are then read-only, cost memory only where
        they are touched, and must not be used after the file was truncated (the system kills the
        process); replacing the file, as :func:`save_safetensors` does, is safe.  Tensors that need
        conversion (BF16, unaligned) are copied all the same.
    half : what F16 and BF16 become, see :data:`HALF`; every other dtype stays what it is.

    Raises FormatError if the file breaks any rule of the format or lacks one of ``names``, ConfigError
    for another ``half``, OSError if it cannot be read.
    """
    with SafetensorsFile(path, mmap=mmap) as file:
        if names is None:
            return {name: file.read(name, half) for name in file.keys()}
        names = {names} if isinstance(names, str) else set(names)
        _require(names, file.keys(), path)
        return {name: file.read(name, half) for name in file.keys() if name in names}


def load_sharded(path, *, half="float32"):
    """Yield ``(name, ndarray)`` for each tensor of a model folder, index or file, one read at a time.

    Only the tensor at hand is in memory, so a model can be converted or quantised as it is read.
    All headers are checked before the first tensor comes; errors as for :func:`load_safetensors`.
    half : what F16 and BF16 become, see :data:`HALF`.
    """
    with SafetensorsFile(path) as file:
        for name in file.header().tensors:
            yield name, file.read(name, half)


def open_safetensors(path, *, mmap=False):
    """Open what ``path`` names (as for :func:`load_safetensors`) without reading any tensor.

    ::

        with open_safetensors("model/") as file:
            for name in file.keys():
                if file.shape(name) == (32000, 512):
                    table = file.read(name)

    Returns a :class:`SafetensorsFile`.
    """
    return SafetensorsFile(path, mmap=mmap)


class SafetensorsFile:
    """The tensors of a file, an index or a model folder, each read when it is asked for.

    A file is opened, and its header checked whole, when the first of its tensors is asked for; it stays
    open until :meth:`close`.  Replacing it meanwhile does no harm.  Use it from one thread at a time.
    """

    def __init__(self, path, *, mmap=False):
        self.path, self._mmap, self._files = path, mmap, {}
        file, weight_map = _resolve(path)
        self._index = weight_map
        self._where = dict.fromkeys(self._opened(file)[1].tensors, file) if weight_map is None else weight_map

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the files.  Arrays that were read stay valid, mapped ones too."""
        for stream, _, _ in self._files.values():
            stream.close()
        self._files.clear()

    def keys(self):
        """Names of all tensors, in the order of the file or the index."""
        return self._where.keys()

    def __contains__(self, name):
        return name in self._where

    def __len__(self):
        return len(self._where)

    def header(self):
        """The checked :class:`Header` of all files together."""
        tensors, metadata = {}, {}
        for file in sorted(set(self._where.values())) if self._index else self._files:
            header = self._opened(file)[1]
            tensors |= header.tensors
            metadata |= header.metadata
        return Header(tensors, metadata)

    def shape(self, name):
        """Shape of the tensor ``name``, a tuple."""
        return self._entry(name)[2].shape

    def dtype(self, name):
        """The format's name of its dtype: ``"F32"``, ``"BF16"`` …"""
        return self._entry(name)[2].dtype

    def read(self, name, half="float32"):
        """The tensor ``name`` as an ndarray of its own, or with ``mmap`` a read-only map.

        half : what F16 and BF16 become, see :data:`HALF`.
        Raises FormatError if there is no such tensor or the file is damaged, ConfigError for another
        ``half``.
        """
        if half not in HALF:
            raise ConfigError(f"half is {half!r}; expected one of {', '.join(map(repr, HALF))}")
        stream, mapped, entry = self._entry(name)
        return _decode(_read(stream, mapped, entry, name), entry, name, half)

    def _entry(self, name):
        if name not in self._where:
            _require([name], self._where, self.path)
        stream, header, mapped = self._opened(self._where[name])
        return stream, mapped, header.tensors[name]

    def _opened(self, file):
        """``(stream, header, map or None)``; the same open file serves header and data."""
        if file not in self._files:
            stream = _open(file)
            try:
                header = _read_header(stream, file)
                if self._index is not None:
                    _check_shard(header, {name for name, where in self._index.items() if where == file}, file)
                access = memory_map.ACCESS_READ
                mapped = memory_map.mmap(stream.fileno(), 0, access=access) if self._mmap else None
            except BaseException:
                stream.close()
                raise
            self._files[file] = stream, header, mapped
        return self._files[file]


def read_header(path):
    """The checked :class:`Header` of what ``path`` names (as for :func:`load_safetensors`), no data."""
    with SafetensorsFile(path) as file:
        return file.header()


def read_metadata(path):
    """The metadata strings of ``path``: dict str → str, empty if there are none."""
    return read_header(path).metadata


def save_safetensors(path, tensors, metadata=None, *, bfloat16=()):
    """Write ``tensors`` (dict name → ndarray) to ``path`` atomically; return its size and SHA-256.

    Any memory layout is accepted and stored in C order: transposed, strided, broadcast, 0-d, empty,
    big-endian.  The same tensors give the same bytes, whatever their order in the dict.
    metadata : dict str → str kept in the header.
    bfloat16 : names of tensors that are uint16 bits of BF16 (:func:`to_bfloat16`) and saved as such.

    The file is read back before it replaces the old one.  Raises DTypeError for anything that is not
    an array of a supported dtype, ShapeError for more than 8 dimensions, FormatError for a name or
    metadata that the format cannot hold, OSError if the disk refuses; the old file then stays.
    """
    dtypes = _format_dtypes(path, tensors, frozenset(bfloat16))
    header, arrays = _layout(path, tensors, dtypes, metadata or {})

    def chunks():
        yield header
        for array in arrays:
            flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
            yield flat.view(np.uint8)

    def check(temporary):
        with _open(temporary) as stream:
            written = _read_header(stream, temporary)
        if {name: (e.dtype, e.shape) for name, e in written.tensors.items()} != {
            name: (dtypes[name], array.shape) for name, array in tensors.items()
        }:
            raise FormatError("the header written does not describe the tensors given", path)

    return write_atomically(path, chunks(), check)


# --- writing -------------------------------------------------------------------------------------


def _format_dtypes(path, tensors, bfloat16):
    """name → the format's dtype name; refuses what the format cannot hold."""
    dtypes = {}
    _require(bfloat16, tensors, path)
    for name, array in tensors.items():
        reason = _bad_name(name)
        if reason:
            raise FormatError(reason, path, name)
        if not isinstance(array, (np.ndarray, np.generic)):
            raise DTypeError(f"{path}: {name!r} is a {type(array).__name__}; expected a NumPy array")
        element = array.dtype.newbyteorder("<")
        dtypes[name] = "BF16" if name in bfloat16 and element == np.uint16 else _NAMES.get(element)
        if dtypes[name] is None or (name in bfloat16) != (dtypes[name] == "BF16"):
            expected = "uint16 bits of BF16" if name in bfloat16 else f"one of {', '.join(map(str, _NAMES))}"
            raise DTypeError(f"{path}: {name!r} has dtype {array.dtype}; expected {expected}")
        if array.ndim > MAXIMUM_DIMENSIONS:
            raise ShapeError(f"{path}: {name!r} has {array.ndim} dimensions; at most {MAXIMUM_DIMENSIONS}")
    return dtypes


def _layout(path, tensors, dtypes, metadata):
    """Header bytes and the arrays in file order: widest dtype first, so that
    every tensor is aligned, then by name."""
    if not all(type(key) is str and type(value) is str for key, value in metadata.items()):
        raise FormatError("metadata must be a dict of str to str", path, _METADATA)
    if len(tensors) > MAXIMUM_TENSORS:
        raise FormatError(f"more than {MAXIMUM_TENSORS} tensors", path)
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        array = tensors[name]
        start, end = end, end + array.size * array.dtype.itemsize
        entries[name] = {"dtype": dtypes[name], "shape": list(array.shape), "data_offsets": [start, end]}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError("a string holds half a surrogate pair", path, _METADATA) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAXIMUM_HEADER_BYTES:
        raise FormatError(f"the header would be larger than {MAXIMUM_HEADER_BYTES} bytes", path)
    header = len(text).to_bytes(8, "little") + text
    return header, [tensors[name] for name in names]


def _bad_name(name):
    """Why ``name`` cannot name a tensor, or None."""
    if type(name) is not str:
        return f"a tensor name is a {type(name).__name__}; expected str"
    if not name or len(name) > MAXIMUM_NAME:
        return f"a tensor name has {len(name)} characters; expected 1 to {MAXIMUM_NAME}"
    if name == _METADATA:
        return "is not available as a tensor name"
    if _FORBIDDEN.search(name):
        return "a tensor name holds a control character"
    return None


# --- reading -------------------------------------------------------------------------------------


def _open(path):
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise FormatError("is not a regular file", path)
    return open(path, "rb")


def _resolve(path):
    """``(file, None)`` for a single file, ``(None, {tensor name: shard file})`` for an index."""
    path = Path(path)
    if path.is_dir():
        candidates = [path / "model.safetensors", path / "model.safetensors.index.json"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise FormatError("the folder holds neither model.safetensors nor its .index.json", str(path))
        path = found[0]
    if not path.name.endswith(".index.json"):
        return str(path), None
    document = load_json(path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no object 'weight_map' of tensor names to file names", str(path))
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and os.path.basename(shard) == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors") or _FORBIDDEN.search(shard):
            raise FormatError(f"maps to {shard!r}; expected a .safetensors file beside it", str(path), name)
    return None, {name: str(path.parent / shard) for name, shard in weight_map.items()}


def _check_shard(header, expected, path):
    if header.tensors.keys() != expected:
        name = min(header.tensors.keys() ^ expected)
        reason = "is missing here, where the index puts it" if name in expected else "is not in the index"
        raise FormatError(reason, path, name)


def _require(names, available, path):
    missing = sorted(set(names) - set(available), key=str)
    if missing:
        some = ", ".join(map(repr, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise FormatError(f"holds no tensor named {some} ({len(missing)} missing)", path)


def _read(stream, mapped, entry, name):
    """The tensor's bytes as a flat array of the element type on disk."""
    element = _ELEMENTS[entry.dtype]
    count = entry.bytes // element.itemsize
    if mapped is not None and count:
        return np.frombuffer(mapped, element, count, entry.start)
    flat = np.empty(count, element)
    stream.seek(entry.start)
    if stream.readinto(flat.view(np.uint8)) != entry.bytes:
        raise FormatError("the file became shorter while it was read", entry.path, name)
    return flat


def _decode(flat, entry, name, half):
    if entry.dtype == "BF16" and half != "bits":
        flat = from_bfloat16(flat)
    elif entry.dtype == "F16" and half == "float32":
        flat = flat.astype(np.float32)
    elif entry.dtype == "BOOL" and flat.size and flat.view(np.uint8).max() > 1:
        raise FormatError("holds a boolean that is neither 0 nor 1", entry.path, name)
    if not flat.flags.aligned:
        flat = flat.copy()
    return flat.astype(flat.dtype.newbyteorder("="), copy=False).reshape(entry.shape)


def _read_header(stream, path):
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise FormatError(f"has {size} bytes, too few for a safetensors file", path)
    length = int.from_bytes(prefix, "little")
    if length > MAXIMUM_HEADER_BYTES or length > size - 8:
        allowed = min(MAXIMUM_HEADER_BYTES, size - 8)
        raise FormatError(f"claims a header of {length} bytes; at most {allowed} are possible here", path)
    text = stream.read(length)
    if len(text) != length:
        raise FormatError("the file became shorter while it was read", path)
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise FormatError("the header is not one JSON object padded with spaces", path)
    document = parse_json(text, path, maximum_depth=3, allow_floats=False)
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("is not an object of strings", path, _METADATA)
    if len(document) > MAXIMUM_TENSORS:
        raise FormatError(f"has {len(document)} tensors; at most {MAXIMUM_TENSORS}", path)
    tensors = {name: _entry(name, fields, 8 + length, path) for name, fields in document.items()}
    _check_coverage(tensors, 8 + length, size, path)
    return Header(tensors, metadata)


def _entry(name, fields, data_start, path):
    def require(condition, reason):
        if not condition:
            raise FormatError(reason, path, name[:MAXIMUM_NAME])

    reason = _bad_name(name)
    require(reason is None, reason)
    keys = {"dtype", "shape", "data_offsets"}
    require(isinstance(fields, dict) and fields.keys() == keys, "expected exactly dtype, shape, data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    known = isinstance(dtype, str) and dtype in _ELEMENTS
    require(known, f"dtype is {dtype!r:.40}; expected one of {', '.join(_ELEMENTS)}")
    require(isinstance(shape, list) and all(type(d) is int for d in shape), "shape is not a list of integers")
    require(len(shape) <= MAXIMUM_DIMENSIONS, f"has {len(shape)} dimensions; at most {MAXIMUM_DIMENSIONS}")
    in_range = all(0 <= d <= MAXIMUM_DIMENSION for d in shape)
    require(in_range, f"a dimension is negative or above {MAXIMUM_DIMENSION}")
    elements = math.prod(d for d in shape if d)
    require(elements <= MAXIMUM_ELEMENTS, f"has more than {MAXIMUM_ELEMENTS} elements")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)
    require(pair and 0 <= offsets[0] <= offsets[1], "data_offsets is not [begin, end] with 0 <= begin <= end")
    expected = (elements if all(shape) else 0) * _ELEMENTS[dtype].itemsize
    spanned = offsets[1] - offsets[0]
    require(spanned == expected, f"spans {spanned} bytes; {dtype} of shape {shape} takes {expected}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], spanned, path)


def _check_coverage(tensors, data_start, size, path):
    """The data is covered exactly once: no hole, no overlap, nothing after the last tensor."""
    end = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            problem = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise FormatError(f"{problem} ({entry.start - end:+d} bytes)", path, name)
        end += entry.bytes
    if end != size:
        raise FormatError(f"the tensors end at byte {end}, the file at byte {size}", path)
