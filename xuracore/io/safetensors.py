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

from xuracore.errors import DTypeError, FormatError, ShapeError
from xuracore.io.atomic import write_atomically
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


def load_safetensors(path, names=None, *, mmap=False):
    """Read named arrays: dict name → ndarray.

    path : a ``.safetensors`` file, a ``.safetensors.index.json`` that spreads tensors over several
        files, or a model folder that holds ``model.safetensors`` or its index.
    names : read only these (an iterable of names, or one name).
    mmap : map the file instead of copying it.  The arrays are then read-only, cost memory only where
        they are touched, and must not be used after the file was truncated (the system kills the
        process); replacing the file, as :func:`save_safetensors` does, is safe.  Tensors that need
        conversion (BF16, unaligned) are copied all the same.

    BF16 becomes float32, every other dtype stays what it is.  Raises FormatError if the file breaks
    any rule of the format or lacks one of ``names``, OSError if it cannot be read.
    """
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
    file, weight_map = _resolve(path)
    if weight_map is None:
        return _load_file(file, names, mmap)
    _require(names, weight_map, path)
    wanted = set(weight_map) if names is None else set(names)
    tensors = {}
    for shard in sorted({weight_map[name] for name in wanted}):
        expected = {name for name, where in weight_map.items() if where == shard}
        tensors |= _load_file(shard, wanted & expected, mmap, expected)
    return tensors


def read_header(path):
    """The checked :class:`Header` of what ``path`` names (as for :func:`load_safetensors`), no data."""
    file, weight_map = _resolve(path)
    if weight_map is None:
        with _open(file) as stream:
            return _read_header(stream, file)
    tensors, metadata = {}, {}
    for shard in sorted(set(weight_map.values())):
        with _open(shard) as stream:
            header = _read_header(stream, shard)
        _check_shard(header, {name for name, where in weight_map.items() if where == shard}, shard)
        tensors |= header.tensors
        metadata |= header.metadata
    return Header(tensors, metadata)


def read_metadata(path):
    """The metadata strings of ``path``: dict str → str, empty if there are none."""
    return read_header(path).metadata


def save_safetensors(path, tensors, metadata=None):
    """Write ``tensors`` (dict name → ndarray) to ``path`` atomically; return its size and SHA-256.

    Any memory layout is accepted and stored in C order: transposed, strided, broadcast, 0-d, empty,
    big-endian.  The same tensors give the same bytes, whatever their order in the dict.
    metadata : dict str → str kept in the header.

    The file is read back before it replaces the old one.  Raises DTypeError for anything that is not
    an array of a supported dtype, ShapeError for more than 8 dimensions, FormatError for a name or
    metadata that the format cannot hold, OSError if the disk refuses; the old file then stays.
    """
    header, arrays = _layout(path, tensors, metadata or {})

    def chunks():
        yield header
        for array in arrays:
            flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
            yield flat.view(np.uint8)

    def check(temporary):
        with _open(temporary) as stream:
            written = _read_header(stream, temporary)
        if {name: (e.dtype, e.shape) for name, e in written.tensors.items()} != {
            name: (_NAMES[array.dtype.newbyteorder("<")], array.shape) for name, array in tensors.items()
        }:
            raise FormatError("the header written does not describe the tensors given", path)

    return write_atomically(path, chunks(), check)


# --- writing -------------------------------------------------------------------------------------


def _layout(path, tensors, metadata):
    """Header bytes and the arrays in file order: widest dtype first, so that
    every tensor is aligned, then by name."""
    for name, array in tensors.items():
        reason = _bad_name(name)
        if reason:
            raise FormatError(reason, path, name)
        if not isinstance(array, (np.ndarray, np.generic)):
            raise DTypeError(f"{path}: {name!r} is a {type(array).__name__}; expected a NumPy array")
        if array.dtype.newbyteorder("<") not in _NAMES:
            raise DTypeError(f"{path}: {name!r} has dtype {array.dtype}; expected one of {_supported()}")
        if array.ndim > MAXIMUM_DIMENSIONS:
            raise ShapeError(f"{path}: {name!r} has {array.ndim} dimensions; at most {MAXIMUM_DIMENSIONS}")
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
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FormatError("a string holds half a surrogate pair", path, _METADATA) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAXIMUM_HEADER_BYTES:
        raise FormatError(f"the header would be larger than {MAXIMUM_HEADER_BYTES} bytes", path)
    header = len(text).to_bytes(8, "little") + text
    return header, [tensors[name] for name in names]


def _supported():
    return ", ".join(str(element) for element in _NAMES)


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


def _load_file(path, names, mmap, expected=None):
    with _open(path) as stream:  # one open file from header to data: it may be replaced meanwhile
        header = _read_header(stream, path)
        if expected is not None:
            _check_shard(header, expected, path)
        _require(names, header.tensors, path)
        wanted = header.tensors if names is None else set(names)
        mapped = memory_map.mmap(stream.fileno(), 0, access=memory_map.ACCESS_READ) if mmap else None
        return {
            name: _decode(_read(stream, mapped, entry, name), entry, name)
            for name, entry in header.tensors.items()
            if name in wanted
        }


def _check_shard(header, expected, path):
    if header.tensors.keys() != expected:
        name = min(header.tensors.keys() ^ expected)
        reason = "is missing here, where the index puts it" if name in expected else "is not in the index"
        raise FormatError(reason, path, name)


def _require(names, available, path):
    missing = [] if names is None else sorted(set(names) - set(available))
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


def _decode(flat, entry, name):
    if entry.dtype == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
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
