"""A file from a stranger: whatever it holds, reading it ends in arrays or in one FormatError."""

import json
import random
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import FormatError
from xuracore.io import load_safetensors, read_header, save_safetensors
from xuracore.io.safetensors import MAXIMUM_HEADER_BYTES


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def write(path, header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


GOOD = {"x": tensor()}

ABSURD = "a dimension is negative or above"
BRACE = "is not one JSON object padded"
LIST = "shape is not a list of integers"
EIGHT = b'"dtype":"U8","data_offsets":[0,8],"shape":'  # of a tensor of eight bytes

# What is wrong: (what the error says, header, data, length claimed for the header if it is not its own)
HOSTILE = {
    "header longer than the file": ("header of 10000 bytes; at most 61", GOOD, b"", 10_000),
    "header of 2^63 bytes": ("header of 9223372036854775808 bytes", GOOD, b"", 2**63),
    "header one byte too long": (BRACE, GOOD, bytes(8), 62),
    "header one byte too short": ("not valid JSON", GOOD, bytes(8), 60),
    "empty header": (BRACE, b"", b""),
    "not JSON": ("not valid JSON", b'{"x":}', b""),
    "a list": (BRACE, b"[]", b""),
    "a blank before the brace": (BRACE, b" {}", b""),
    "a newline after the brace": (BRACE, b"{}\n", b""),
    "a byte order mark": (BRACE, b"\xef\xbb\xbf{}", b""),
    "UTF-16": (BRACE, "{}".encode("utf-16-le"), b""),
    "invalid UTF-8": ("not UTF-8 .* at byte 2", b'{"\xff":{}}', b""),
    "two documents": ("Extra data", b"{}{}", b""),
    "a name twice": ("'x': appears twice", b'{"x":{%b[8]},"x":{%b[8]}}' % (EIGHT, EIGHT), bytes(8)),
    "a name twice, once escaped": (
        "'x': appears twice",
        b'{"x":{%b[8]},"\\u0078":{%b[8]}}' % (EIGHT, EIGHT),
        bytes(8),
    ),
    "a field twice": ("'shape': appears twice", b'{"x":{%b[8],"shape":[8]}}' % EIGHT, bytes(8)),
    "NaN": ("NaN is not", b'{"x":{%b[NaN]}}' % EIGHT, bytes(8)),
    "Infinity": ("-Infinity is not", b'{"x":{%b[-Infinity]}}' % EIGHT, bytes(8)),
    "a float dimension": ("8.0 is not an integer", b'{"x":{%b[8.0]}}' % EIGHT, bytes(8)),
    "an exponent": ("8e0 is not an integer", b'{"x":{%b[8e0]}}' % EIGHT, bytes(8)),
    "an integer of 10000 digits": ("not valid JSON", b'{"x":{%b[%b]}}' % (EIGHT, b"9" * 10_000), bytes(8)),
    "a deep list": ("deeper than 3", b'{"x":%b%b}' % (b"[" * 100_000, b"]" * 100_000), b""),
    "a deep list, not closed": ("deeper than 3", b'{"x":%b}' % (b"[" * 100_000), b""),
    "a million empty lists": ("more than 1000000 lists", b'{"x":[%b[]]}' % (b"[]," * 1_500_000), b""),
    "a true dimension": (LIST, {"x": tensor("U8", [True], [0, 1])}, bytes(1)),
    "a text dimension": (LIST, {"x": tensor(shape=["2"])}, bytes(8)),
    "shape is a number": (LIST, {"x": tensor() | {"shape": 2}}, bytes(8)),
    "shape is null": (LIST, {"x": tensor() | {"shape": None}}, bytes(8)),
    "a negative dimension": (ABSURD, {"x": tensor(shape=[-2])}, bytes(8)),
    "two negative dimensions": (ABSURD, {"x": tensor(shape=[-2, -1])}, bytes(8)),
    "nine dimensions": ("9 dimensions", {"x": tensor(shape=[2] + [1] * 8)}, bytes(8)),
    "a product that wraps at 64 bits": ("elements", {"x": tensor(shape=[2**32] * 2, offsets=[0, 0])}, b""),
    "a product above 2^48": ("elements", {"x": tensor("U8", [2**25, 2**25], [0, 2**50])}, bytes(8)),
    "an empty tensor, absurd dimension": (ABSURD, {"x": tensor(shape=[2**40, 0], offsets=[0, 0])}, b""),
    "an empty tensor, absurd product": (
        "elements",
        {"x": tensor(shape=[2**30, 2**30, 0], offsets=[0, 0])},
        b"",
    ),
    "span larger than the shape": ("spans 8 bytes", {"x": tensor(shape=[1])}, bytes(8)),
    "span smaller than the shape": ("spans 8 bytes", {"x": tensor(shape=[2**20])}, bytes(8)),
    "begin after end": ("data_offsets", {"x": tensor(offsets=[8, 0])}, bytes(8)),
    "negative begin": ("data_offsets", {"x": tensor(offsets=[-8, 0])}, bytes(8)),
    "three offsets": ("data_offsets", {"x": tensor(offsets=[0, 8, 16])}, bytes(8)),
    "true as an offset": ("data_offsets", {"x": tensor("U8", [1], [False, True])}, bytes(1)),
    "offsets beyond the file": ("end at byte 77, the file at byte 69", GOOD, b""),
    "data missing": ("end at byte 77, the file at byte 76", GOOD, bytes(7)),
    "data left over": ("end at byte 77, the file at byte 78", GOOD, bytes(9)),
    "a hole at the start": (r"'x': leaves a hole .*\+8", {"x": tensor(offsets=[8, 16])}, bytes(16)),
    "a hole between": (
        r"'y': leaves a hole .*\+4",
        {"x": tensor(), "y": tensor(offsets=[12, 20])},
        bytes(20),
    ),
    "an overlap": ("'y': overlaps .*-4", {"x": tensor(), "y": tensor(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": ("'y': overlaps .*-8", {"x": tensor(), "y": tensor()}, bytes(8)),
    "an empty tensor inside another": ("overlaps", {"x": tensor(), "y": tensor("U8", [0], [4, 4])}, bytes(8)),
    "an unknown dtype": ("'x': dtype is 'F31'", {"x": tensor("F31")}, bytes(8)),
    "dtype is a list": (r"dtype is \['F32'\]", {"x": tensor(["F32"])}, bytes(8)),
    "dtype in lower case": ("dtype is 'f32'", {"x": tensor("f32")}, bytes(8)),
    "no dtype": ("expected exactly", {"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "an extra field": ("expected exactly", {"x": tensor(strides=[1])}, bytes(8)),
    "a tensor that is a list": ("expected exactly", {"x": [1]}, b""),
    "an empty name": ("name has 0 characters", {"": tensor()}, bytes(8)),
    "a long name": ("name has 9999 characters", {"n" * 9999: tensor()}, bytes(8)),
    "a control character in a name": ("control character", {"a\x1b[2J": tensor()}, bytes(8)),
    "half a surrogate pair": ("surrogate", {"\ud800": tensor()}, bytes(8)),
    "metadata is a list": ("__metadata__': is not an object of strings", {"__metadata__": []}, b""),
    "metadata holds a number": ("__metadata__': is not", {"__metadata__": {"a": 1}}, b""),
    "metadata nests": ("__metadata__': is not", {"__metadata__": {"a": {"b": "c"}}}, b""),
    "a boolean of 2": ("neither 0 nor 1", {"x": tensor("BOOL", [8])}, b"\0\1\2\0\0\0\0\0"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_hostile_file_is_refused(tmp_path, case, mmap):
    reason, *file = HOSTILE[case]
    path = write(tmp_path / "hostile.safetensors", *file)
    start = time.process_time()
    with pytest.raises(FormatError, match=f"hostile.safetensors: .*{reason}") as caught:
        load_safetensors(path, mmap=mmap)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1500


def test_the_case_that_all_others_vary_is_itself_accepted(tmp_path):
    assert load_safetensors(write(tmp_path / "t", GOOD))["x"].tolist() == [0, 0]
    empty = {"x": tensor(), "y": tensor(shape=[3, 0], offsets=[8, 8]), "z": tensor(shape=[0], offsets=[0, 0])}
    loaded = load_safetensors(write(tmp_path / "t", empty))
    assert loaded["y"].shape == (3, 0) and loaded["z"].shape == (0,)
    assert load_safetensors(write(tmp_path / "t", b"{}   ", b"")) == {}


def test_errors_name_the_file_and_the_tensor(tmp_path):
    with pytest.raises(FormatError) as caught:
        read_header(write(tmp_path / "t", {"layer.0.weight": tensor("Q4")}))
    error = caught.value
    assert error.entry == "layer.0.weight" and error.path == str(tmp_path / "t") and "Q4" in error.reason


@pytest.mark.slow
def test_the_largest_header_is_refused_within_bounds(tmp_path):
    for filling in (b"[],", b"{},", b'"aa",', b"300,", b'\\"', b'"":0,'):
        text = b'{"x":[' + filling * (MAXIMUM_HEADER_BYTES // len(filling) - 10)
        path = write(tmp_path / "t", text, b"")
        start = time.process_time()
        with pytest.raises(FormatError):
            load_safetensors(path)
        assert time.process_time() - start < 10


def sample():
    rng = np.random.default_rng(5)
    return {
        "embedding.weight": rng.standard_normal((16, 8)).astype(np.float32),
        "layers.0.bias": rng.standard_normal(7),
        "mask": rng.random(9) > 0.5,
        "counts": rng.integers(0, 99, (3, 3)),
        "empty": np.zeros((0, 4), np.float16),
        "scale": np.array(2.0, np.float32),
    }


def attempt(path):
    """Load within bounds: dict, or None for a FormatError; anything else fails the test."""
    tracemalloc.start()
    start = time.process_time()
    try:
        return load_safetensors(path)
    except FormatError:
        return None
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - start
        tracemalloc.stop()
        assert seconds < 1
        assert peak < 2 * path.stat().st_size + 200_000


def test_a_file_cut_at_any_place_is_refused(tmp_path):
    path = tmp_path / "t"
    size = save_safetensors(path, sample(), {"k": "v"}).bytes
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: size * part // 64])
        assert attempt(path) is None
    path.write_bytes(whole[:-1])
    assert attempt(path) is None


def test_flipping_any_one_bit_is_refused_or_stays_in_bounds(tmp_path):
    path, tree = tmp_path / "t", sample()
    save_safetensors(path, tree)
    whole = path.read_bytes()
    data_bytes = sum(array.nbytes for array in tree.values())
    rng = random.Random(1)
    for _ in range(1000):
        damaged = bytearray(whole)
        position = rng.randrange(len(damaged))
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        loaded = attempt(path)
        if loaded is not None:  # another name or value; never more or less data than there is
            assert sum(array.nbytes for array in loaded.values()) == data_bytes
        if position < 8:
            assert loaded is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BOOL", "U8", "F64", "BF16", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.integers(2**31, 2**65), max_size=9) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(2**31, 2**65), max_size=3) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), fields | json_values, max_size=3)


@given(headers, st.binary(max_size=40))
def test_any_header_ends_in_arrays_or_in_a_format_error(tmp_path_factory, header, data):
    path = write(tmp_path_factory.mktemp("any") / "t", header, data)
    loaded = attempt(path)
    if loaded is not None:
        elements = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        widened = sum(
            array.nbytes // (2 if elements[name] == "BF16" else 1) for name, array in loaded.items()
        )
        assert widened == len(data)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_format_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(data)
    assert attempt(path) in (None, {})


@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "U8", "F64"]), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_moving_any_one_offset_of_a_valid_file_is_refused(tmp_path_factory, specification, data):
    header, end = {}, 0
    for index, (dtype, shape) in enumerate(specification):
        begin, end = end, end + int(np.prod(shape)) * {"F32": 4, "U8": 1, "F64": 8}[dtype]
        header[f"t{index}"] = tensor(dtype, shape, [begin, end])
    path = write(tmp_path_factory.mktemp("moved") / "t", header, bytes(end))
    assert load_safetensors(path).keys() == header.keys()
    name = data.draw(st.sampled_from(sorted(header)))
    by = data.draw(st.integers(-9, 9).filter(bool))
    header[name]["data_offsets"][data.draw(st.integers(0, 1))] += by
    assert attempt(write(path, header, bytes(end))) is None
