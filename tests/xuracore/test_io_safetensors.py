"""What is saved is what is loaded: every dtype, shape and memory layout."""

import json
import os
import tracemalloc

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import ConfigError, DTypeError, FormatError, ShapeError
from xuracore.io import (
    from_bfloat16,
    load_safetensors,
    load_sharded,
    open_safetensors,
    read_header,
    read_metadata,
    save_safetensors,
    to_bfloat16,
)

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]

names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
trees = st.dictionaries(names, arrays, max_size=6)


def assert_same(loaded, saved):
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
        assert loaded[name].flags.c_contiguous and loaded[name].dtype.isnative


def raw_file(path, header, data=b""):
    """A file with exactly this header (an object, or the text itself) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@given(
    trees,
    st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
    st.booleans(),
)
def test_what_is_saved_is_loaded(tmp_path_factory, tree, metadata, mmap):
    path = tmp_path_factory.mktemp("round") / "t.safetensors"
    save_safetensors(path, tree, metadata)
    assert_same(load_safetensors(path, mmap=mmap), tree)
    assert read_metadata(path) == metadata
    header = read_header(path)
    assert {n: e.shape for n, e in header.tensors.items()} == {n: a.shape for n, a in tree.items()}


@given(trees)
def test_equal_tensors_give_equal_bytes(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("same")
    first = save_safetensors(folder / "a", tree, {"b": "1", "a": "2"})
    second = save_safetensors(folder / "b", dict(reversed(tree.items())), {"a": "2", "b": "1"})
    assert first == second
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LAYOUTS = {
    "transposed": BASE.T,
    "fortran": np.asfortranarray(BASE),
    "strided": BASE[:, ::2, 1::2],
    "reversed": BASE[::-1, :, ::-1],
    "broadcast": np.broadcast_to(BASE[0, 0], (5, 4)),
    "0-d": np.array(3.5, np.float32),
    "scalar": np.float64(2.25),
    "empty": np.empty((3, 0, 2), np.int16),
    "big-endian": BASE.astype(">f4"),
    "big-endian transposed": BASE.astype(">i8").T,
    "read-only": np.frombuffer(b"\x01\x02\x03", np.uint8),
    "one boolean": np.array(True),
    "unaligned": np.frombuffer(b"\0" + BASE.tobytes(), np.float32, offset=1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mmap", [False, True])
def test_every_memory_layout_is_saved_correctly(tmp_path, layout, mmap):
    array = LAYOUTS[layout]
    save_safetensors(tmp_path / "t", {"x": array, "odd": np.zeros(3, np.uint8)})
    loaded = load_safetensors(tmp_path / "t", mmap=mmap)["x"]
    expected = np.asarray(array).astype(array.dtype.newbyteorder("="))
    np.testing.assert_array_equal(loaded, expected, strict=True)


def test_bfloat16_becomes_the_float32_of_the_same_value(tmp_path):
    bits = np.arange(65536, dtype=np.uint16)
    entry = {"dtype": "BF16", "shape": [256, 256], "data_offsets": [0, 131072]}
    path = raw_file(tmp_path / "t", {"x": entry}, bits.tobytes())
    loaded = load_safetensors(path)["x"]
    assert loaded.dtype == np.float32 and loaded.shape == (256, 256)
    np.testing.assert_array_equal(loaded.view(np.uint32).reshape(-1), bits.astype(np.uint32) << 16)


def test_bits_of_bfloat16_are_kept_and_saved_again(tmp_path):
    bits = np.arange(65536, dtype=np.uint16).reshape(64, -1)
    tree = {"x": bits, "y": np.ones(3, np.float16), "z": np.ones(2, np.float32)}
    save_safetensors(tmp_path / "t", tree, bfloat16=["x"])
    assert {name: entry.dtype for name, entry in read_header(tmp_path / "t").tensors.items()} == {
        "x": "BF16", "y": "F16", "z": "F32",
    }  # fmt: skip
    assert_same(load_safetensors(tmp_path / "t", half="bits"), tree)
    native = load_safetensors(tmp_path / "t")
    assert_same(native, tree | {"x": from_bfloat16(bits)})
    wide = load_safetensors(tmp_path / "t", half="float32")
    assert_same(wide, native | {"y": np.ones(3, np.float32)})
    with pytest.raises(ConfigError, match="half is 'keep'; expected one of 'native', 'float32', 'bits'"):
        load_safetensors(tmp_path / "t", half="keep")
    with pytest.raises(DTypeError, match="'x' has dtype uint16; expected one of"):
        save_safetensors(tmp_path / "t", tree)
    with pytest.raises(DTypeError, match="'y' has dtype float16; expected uint16 bits of BF16"):
        save_safetensors(tmp_path / "t", tree, bfloat16=["x", "y"])
    with pytest.raises(FormatError, match="holds no tensor named 'absent'"):
        save_safetensors(tmp_path / "t", tree, bfloat16=["x", "absent"])


def test_rounding_to_bfloat16_is_to_the_nearest_with_ties_to_even():
    bits = np.arange(65536, dtype=np.uint16)
    exact = from_bfloat16(bits)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(to_bfloat16(exact)[finite], bits[finite])
    assert np.isnan(from_bfloat16(to_bfloat16(exact[np.isnan(exact)]))).all()
    assert from_bfloat16(to_bfloat16(np.float32([np.inf, -np.inf, 3.4e38]))).tolist() == [np.inf, -np.inf, np.inf]
    x = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    rounded = from_bfloat16(to_bfloat16(x.T))
    assert rounded.shape == (40, 50) and (np.abs(rounded - x.T) <= np.abs(x.T) * 2.0**-8).all()
    ties = np.float32([1 + 2**-8, 1 + 3 * 2**-8])
    assert from_bfloat16(to_bfloat16(ties)).tolist() == [1, 1 + 2**-6]
    assert to_bfloat16(np.float32(1)).shape == ()


def test_an_open_file_reads_each_tensor_when_asked(tmp_path):
    tree = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.zeros(0, bool)}
    save_safetensors(tmp_path / "t", tree, {"k": "v"})
    with open_safetensors(tmp_path / "t") as file:
        assert set(file.keys()) == tree.keys() and len(file) == 3 and "a" in file and "d" not in file
        assert (file.shape("a"), file.dtype("a"), file.dtype("b")) == ((2, 3), "F64", "F16")
        assert file.header().metadata == {"k": "v"}
        assert file.read("b").dtype == np.float32 and file.read("b", "native").dtype == np.float16
        np.testing.assert_array_equal(file.read("a"), tree["a"], strict=True)
        for ask in (file.read, file.shape, file.dtype):
            with pytest.raises(FormatError, match="holds no tensor named 'd'"):
                ask("d")
        save_safetensors(tmp_path / "t", {"a": np.zeros(1)})  # what is open stays what it was
        np.testing.assert_array_equal(file.read("a"), tree["a"], strict=True)
    with open_safetensors(tmp_path / "t", mmap=True) as file:
        kept = file.read("a")
    assert kept.tolist() == [0] and not kept.flags.writeable


def test_reading_one_tensor_takes_the_memory_of_one(tmp_path):
    save_safetensors(tmp_path / "t", {f"t{i}": np.full(50_000, i, np.float32) for i in range(20)})
    tracemalloc.start()
    try:
        names = [name for name, array in load_sharded(tmp_path / "t") if array[0] == int(name[1:])]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(names) == 20 and peak < 3 * 200_000


def test_tensors_of_our_files_are_aligned(tmp_path):
    tree = {f"{d}{n}": np.zeros(n, d) for d in DTYPES for n in (1, 3)}
    save_safetensors(tmp_path / "t", tree, {"k": "odd length"})
    for entry in read_header(tmp_path / "t").tensors.values():
        assert entry.start % (8 if entry.dtype.endswith("64") else 1) == 0
    assert all(array.flags.aligned for array in load_safetensors(tmp_path / "t", mmap=True).values())


def test_an_unaligned_foreign_file_can_be_mapped(tmp_path):
    values = np.arange(5, dtype=np.float64)
    header = b'{"x":{"dtype":"F64","shape":[5],"data_offsets":[0,40]}} '
    for padding in range(8):
        path = raw_file(tmp_path / "t", header + b" " * padding, values.tobytes())
        loaded = load_safetensors(path, mmap=True)["x"]
        np.testing.assert_array_equal(loaded, values)
        assert loaded.flags.aligned


def test_only_the_named_tensors_are_read(tmp_path):
    tree = {"a": np.zeros(2), "b": np.ones(3), "c": np.ones(1)}
    save_safetensors(tmp_path / "t", tree)
    assert_same(load_safetensors(tmp_path / "t", ["c", "a"]), {"a": tree["a"], "c": tree["c"]})
    assert_same(load_safetensors(tmp_path / "t", "b"), {"b": tree["b"]})
    assert load_safetensors(tmp_path / "t", []) == {}
    with pytest.raises(FormatError, match="no tensor named 'd', 'e' .2 missing"):
        load_safetensors(tmp_path / "t", ["a", "e", "d"])


def test_a_mapping_outlives_the_replacement_of_its_file(tmp_path):
    save_safetensors(tmp_path / "t", {"x": np.zeros(4)})
    mapped = load_safetensors(tmp_path / "t", mmap=True)["x"]
    save_safetensors(tmp_path / "t", {"x": np.ones(4)})
    assert mapped.tolist() == [0, 0, 0, 0] and not mapped.flags.writeable
    assert load_safetensors(tmp_path / "t")["x"].tolist() == [1, 1, 1, 1]


def test_copies_are_writable_and_do_not_share_memory(tmp_path):
    save_safetensors(tmp_path / "t", {"x": np.zeros(4), "y": np.zeros(4)})
    loaded = load_safetensors(tmp_path / "t")
    loaded["x"][:] = 7
    assert loaded["y"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tree", "error"),
    [
        ({"x": np.zeros(2, np.complex64)}, DTypeError),
        ({"x": np.zeros(2, np.uint64)}, DTypeError),
        ({"x": np.array(["text"])}, DTypeError),
        ({"x": np.array([None])}, DTypeError),
        ({"x": [1.0, 2.0]}, DTypeError),
        ({"x": np.zeros((1,) * 9)}, ShapeError),
        ({"": np.zeros(2)}, FormatError),
        ({"__metadata__": np.zeros(2)}, FormatError),
        ({"line\nbreak": np.zeros(2)}, FormatError),
        ({"\ud800": np.zeros(2)}, FormatError),
        ({"n" * 513: np.zeros(2)}, FormatError),
        ({7: np.zeros(2)}, FormatError),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, tree, error):
    save_safetensors(tmp_path / "t", {"old": np.ones(1)})
    with pytest.raises(error, match="t: "):
        save_safetensors(tmp_path / "t", tree)
    assert list(load_safetensors(tmp_path / "t")) == ["old"]
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("metadata", [{"k": 1}, {1: "v"}, {"k": None}, {"k": "\ud800"}])
def test_metadata_is_text(tmp_path, metadata):
    with pytest.raises(FormatError, match="__metadata__"):
        save_safetensors(tmp_path / "t", {}, metadata)


def sharded(folder, weight_map):
    for shard in set(weight_map.values()):
        tree = {name: np.full(2, ord(name)) for name, where in weight_map.items() if where == shard}
        save_safetensors(folder / shard, tree)
    index = {"metadata": {"total_size": 1.5e3}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_and_its_folder_load_all_shards(tmp_path):
    sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"})
    expected = {name: np.full(2, ord(name)) for name in "abc"}
    assert_same(load_safetensors(tmp_path), expected)
    assert_same(load_safetensors(tmp_path / "model.safetensors.index.json", mmap=True), expected)
    assert_same(load_safetensors(tmp_path, ["b"]), {"b": expected["b"]})
    assert read_header(tmp_path).tensors.keys() == set("abc")
    assert_same(dict(load_sharded(tmp_path)), expected)
    with open_safetensors(tmp_path) as file:
        assert [file.shape(name) for name in "abc"] == [(2,)] * 3
        np.testing.assert_array_equal(file.read("b"), expected["b"], strict=True)
    (tmp_path / "m-1.safetensors").unlink()
    assert_same(load_safetensors(tmp_path, ["b"]), {"b": expected["b"]})  # the other shard is not needed
    for read in (load_safetensors, lambda path: next(load_sharded(path))):
        with pytest.raises(FileNotFoundError):
            read(tmp_path)
    with pytest.raises(FormatError, match="no tensor named 'z'"):
        load_safetensors(tmp_path, ["z"])


@pytest.mark.parametrize(
    "shard",
    ["../m.safetensors", "/etc/m.safetensors", "a/m.safetensors", "..", "m.bin", 3, None, "a\\m.safetensors"],
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FormatError, match="'a': maps to"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("document", [[], {}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_needs_a_weight_map(tmp_path, document):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match="weight_map"):
        load_safetensors(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path):
    sharded(tmp_path, {"a": "m.safetensors", "b": "m.safetensors"})
    save_safetensors(tmp_path / "m.safetensors", {"a": np.zeros(1)})
    with pytest.raises(FormatError, match="'b': is missing here"):
        load_safetensors(tmp_path)
    save_safetensors(tmp_path / "m.safetensors", {n: np.zeros(1) for n in "abc"})
    for read in (load_safetensors, read_header):
        with pytest.raises(FormatError, match="'c': is not in the index"):
            read(tmp_path)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(FormatError, match="neither model.safetensors nor"):
        load_safetensors(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        load_safetensors(tmp_path / "pipe")


def test_the_official_package_reads_ours_and_we_read_its_files(tmp_path):
    official = pytest.importorskip("safetensors.numpy", reason="the official package is not installed")
    tree = {name: np.ascontiguousarray(array) for name, array in LAYOUTS.items() if array.dtype.isnative}
    save_safetensors(tmp_path / "ours", tree | {"transposed": BASE.T}, {"k": "v"})
    assert_same(official.load_file(tmp_path / "ours"), {**tree, "transposed": np.ascontiguousarray(BASE.T)})
    official.save_file(tree, tmp_path / "theirs", {"k": "v"})
    assert_same(load_safetensors(tmp_path / "theirs"), tree)
    assert read_metadata(tmp_path / "theirs") == {"k": "v"}
