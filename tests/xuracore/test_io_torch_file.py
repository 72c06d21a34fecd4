"""Torch files: read without unpickling; whatever is not a dictionary of tensors is refused by its byte."""

import math
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xuracore.errors import ConfigError, FormatError
from xuracore.io import torch_file, torch_pickle
from xuracore.io.torch_file import open_torch_file


# ------------------------------------------------------------------ a pickle, byte by byte
def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module, word):
    return f"c{module}\n{word}\n".encode()


ORDERED = name("collections", "OrderedDict") + b")R"


def storage(kind="FloatStorage", key="0", count=6, place="cpu", first="storage"):
    return b"(" + text(first) + name("torch", kind) + text(key) + text(place) + number(count) + b"tQ"


def tensor(held=None, offset=0, shape=(2, 3), strides=(3, 1), rest=b"\x89" + ORDERED):
    held = storage() if held is None else held
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + held + number(offset) + numbers(shape) + numbers(strides) + rest + b"tR"


def program(*pairs, before=b"", after=b""):
    body = b"".join(text(key) + value for key, value in pairs)
    return b"\x80\x02" + before + ORDERED + b"(" + body + b"u" + after + b"."


VALUES = np.arange(6, dtype=np.float32)


def archive(path, pickle, storages=None, extra=(), root="archive", compression=zipfile.ZIP_STORED):
    storages = {"0": VALUES.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", pickle)
        file.writestr(f"{root}/byteorder", "little")
        for key, raw in storages.items():
            file.writestr(f"{root}/data/{key}", raw)
        for entry, raw in extra:
            file.writestr(entry, raw)
    return path


def load(path, **options):
    with open_torch_file(path) as file:
        return {name: file.read(name, **options) for name in file.keys()}


# ------------------------------------------------------------------ what is read
def test_a_state_dict_is_read(tmp_path):
    attributes = b"}" + text("_metadata") + ORDERED + b"sb"
    parameter = name("torch._utils", "_rebuild_parameter") + b"(" + tensor() + b"\x88" + ORDERED + b"tR"
    pickle = program(("weight", tensor()), ("turned", tensor(shape=(3, 2), strides=(1, 3))),
                     ("last", tensor(offset=4, shape=(2,), strides=(1,))), ("parameter", parameter),
                     ("one", tensor(offset=5, shape=(), strides=())), after=attributes)  # fmt: skip
    path = archive(tmp_path / "pytorch_model.bin", pickle)
    with open_torch_file(path) as file:
        assert list(file.keys()) == ["weight", "turned", "last", "parameter", "one"] and len(file) == 5
        assert file.shape("turned") == (3, 2) and file.dtype("weight") == "F32" and "weight" in file
        with pytest.raises(FormatError, match="no tensor named 'other'"):
            file.read("other")
        with pytest.raises(ConfigError, match="half"):
            file.read("weight", half="quarter")
    read = load(path)
    np.testing.assert_array_equal(read["weight"], VALUES.reshape(2, 3))
    np.testing.assert_array_equal(read["turned"], VALUES.reshape(2, 3).T)
    np.testing.assert_array_equal(read["last"], [4, 5])
    np.testing.assert_array_equal(read["parameter"], read["weight"])
    assert read["one"] == 5
    assert all(array.flags.c_contiguous and array.flags.writeable for array in read.values())
    read["weight"][:] = 7  # shares a storage with the others in the file, not in memory
    assert read["last"][0] == 4


@pytest.mark.parametrize("memoized", [False, True])
def test_every_opcode_that_torch_writes_is_followed(tmp_path, memoized):
    short = b"\x8c\x01w"  # the fourth protocol: short strings, frames, names from the stack, a memo by order
    modern = b"\x80\x04\x95" + struct.pack("<Q", 0) + b"}" + b"\x94" * memoized + short
    held = (b"(" + text("storage") + text("torch") + text("FloatStorage") + b"\x93" + text("0") + text("cpu")
            + b"K\x06tQ")  # fmt: skip
    rebuild = text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93"
    inner = b"(" + held + b"K\x00" + b"K\x02K\x03\x86" + b"M\x03\x00K\x01\x86" + b"\x89N" + b"tR"
    path = archive(tmp_path / "f", modern + rebuild + inner + b"s.")
    np.testing.assert_array_equal(load(path)["w"], VALUES.reshape(2, 3))


@pytest.mark.parametrize("kind", torch_pickle.STORAGES)
def test_every_type_of_storage_is_read(tmp_path, kind):
    format_dtype, element = torch_pickle.STORAGES[kind]
    values = np.array([0, 1, 1, 0, 1, 0]).astype("<f4" if kind == "BFloat16Storage" else element)
    raw = (values.view(np.uint32) >> 16).astype("<u2") if kind == "BFloat16Storage" else values
    path = archive(tmp_path / "f", program(("w", tensor(storage(kind)))), {"0": raw.tobytes()})
    with open_torch_file(path) as file:
        assert file.dtype("w") == format_dtype
    wide, native, bits = (load(path, half=half)["w"] for half in ("float32", "native", "bits"))
    np.testing.assert_array_equal(wide.ravel(), values.astype(wide.dtype))
    halves = ("F16", "BF16")
    assert wide.dtype == (np.float32 if format_dtype in halves else np.dtype(element).newbyteorder("="))
    assert native.dtype == (np.float16 if format_dtype == "F16" else wide.dtype)
    assert bits.dtype == {"F16": np.float16, "BF16": np.uint16}.get(format_dtype, wide.dtype)


@given(st.lists(st.integers(1, 3), max_size=4).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), st.permutations(range(len(shape))), st.integers(0, 5))))  # fmt: skip
def test_any_layout_reads_as_the_strided_view(tmp_path_factory, layout):
    shape, order, offset = layout
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis], step = step, step * shape[axis]
    values = np.arange(offset + math.prod(shape), dtype=np.float32)
    pickle = program(("w", tensor(storage(count=len(values)), offset, shape, strides)))
    path = archive(tmp_path_factory.mktemp("t") / "f", pickle, {"0": values.tobytes()})
    expected = np.lib.stride_tricks.as_strided(values[offset:], shape, [4 * s for s in strides])
    np.testing.assert_array_equal(load(path)["w"], expected, strict=True)


# ------------------------------------------------------------------ what is refused
SYSTEM = name("os", "system") + b"(" + text("true") + b"tR"
REFUSED = {  # pickle: what the error says
    "a command": (program(("w", SYSTEM)), "'os.system' is refused"),
    "a command of builtins": (program(("w", name("builtins", "eval"))), "'builtins.eval' is refused"),
    "a name from the stack": (b"\x80\x04" + text("posix") + text("system") + b"\x93.", "'posix.system'"),
    "a deeper name": (program(("w", name("torch", "FloatStorage.__init__"))), "is refused"),
    "another function of torch": (program(("w", name("torch._utils", "_rebuild_tensor_v3"))), "is refused"),
    "a storage that is called": (program(("w", name("torch", "FloatStorage") + b")R")), "is called"),
    "an object": (program(("w", name("collections", "OrderedDict") + b")\x81")), "NEWOBJ is refused"),
    "an instance": (program(("w", b"(ios\nsystem\n")), "INST is refused"),
    "an extension": (program(("w", b"\x82\x01")), "EXT1 is refused"),
    "a buffer": (program(("w", b"\x97")), "NEXT_BUFFER is refused"),
    "bytes": (program(("w", b"C\x01a")), "SHORT_BINBYTES is refused"),
    "a set": (program(("w", b"\x8f")), "EMPTY_SET is refused"),
    "an old string": (program(("w", b"S'a'\n")), "STRING is refused"),
    "an endless number": (program(("w", b"L" + b"9" * 9000 + b"L\n")), "is not a pickle"),
    "a dictionary of arguments": (program(("w", name("collections", "OrderedDict") + b"}\x85R")), "other than"),
    "state on a tensor": (program(("w", tensor() + b"}b")), "no dictionary"),
    "state that is no dictionary": (program(("w", b"}K\x01b")), "another kind"),
    "items of a tuple": (program(("w", b")(" + text("a") + b"K\x01u")), "no dictionary"),
    "a key without value": (b"}(" + text("a") + b"u.", "no value"),
    "a key that is no string": (b"}K\x01K\x01s.", "key is a int"),
    "a key twice": (program(("w", tensor()), ("w", tensor())), "'w' comes twice"),
    "append to a dictionary": (b"}K\x01a.", "no list"),
    "an empty stack": (b"Q.", "empty stack"),
    "no mark": (b"t.", "no mark"),
    "a memory never kept": (b"h\x07.", "recalls entry 7"),
    "nothing": (b"", "is not a pickle"),
    "two values": (b"}}.", "other than one"),
    "no end": (b"}", "is not a pickle"),
    "something after the end": (program() + b"x", "before its last 1 bytes"),
    "noise": (b"\xff\xfe\xfd", "is not a pickle"),
    "a text longer than the file": (b"X" + struct.pack("<I", 2**32 - 1) + b"a", "is not a pickle"),
    "a number": (b"K\x01.", "dictionary of tensors"),
    "a list": (b"].", "dictionary of tensors"),
    "a nested dictionary": (program(("model", ORDERED)), "'model': is not a tensor"),
    "a reference to no storage": (program(("w", b"K\x01\x85Q")), "not to a storage"),
    "a module": (program(("w", tensor(storage(first="module")))), "not to a storage"),
    "a storage outside the folder": (program(("w", tensor(storage(key="../0")))), "key of a storage"),
    "a storage that is missing": (program(("w", tensor(storage(key="1")))), "'1' is not in the file"),
    "a storage of another size": (program(("w", tensor(storage(count=7)))), "24 bytes; 7 × F32 take 28"),
    "a storage of minus one": (program(("w", tensor(storage(count=-1)))), "out of range"),
    "a storage beyond all memory": (program(("w", tensor(storage(count=2**60)))), "out of range"),
    "no storage": (program(("w", tensor(held=b"N"))), "no storage"),
    "too few values": (program(("w", tensor(rest=b""))), "described by 4 values"),
    "a negative size": (program(("w", tensor(shape=(-2, -3)))), "negative"),
    "a negative stride": (program(("w", tensor(offset=5, shape=(6,), strides=(-1,)))), "negative"),
    "a negative offset": (program(("w", tensor(offset=-1))), "offset"),
    "a stride out of the storage": (program(("w", tensor(strides=(4, 1)))), "reaches 7 of the 6"),
    "an offset out of the storage": (program(("w", tensor(offset=1))), "reaches 7 of the 6"),
    "a huge shape": (program(("w", tensor(shape=(2**40, 2**40), strides=(1, 1)))), "of the 6"),
    "a broadcast bomb": (program(("w", tensor(shape=(2**40,), strides=(0,)))), "of the 6"),
    "true for one": (program(("w", tensor(shape=(), strides=()).replace(b"(t", b"(\x88t", 1))), "not whole"),
    "too many dimensions": (program(("w", tensor(shape=(1,) * 9, strides=(1,) * 9))), "at most 8"),
    "fewer strides": (program(("w", tensor(strides=(3,)))), "1 strides"),
    "a shape that is no tuple": (program(("w", tensor().replace(numbers((2, 3)), b"]"))), "not a tuple"),
    "a parameter of nothing": (program(("w", name("torch._utils", "_rebuild_parameter") + b")R")), "no tensor"),
    "a name with a line break": (program(("a\nb", tensor())), "control characters"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_pickle_is_refused_with_the_reason(tmp_path, case):
    pickle, says = REFUSED[case]
    with pytest.raises(FormatError, match="f: .*") as caught:
        open_torch_file(archive(tmp_path / "f", pickle))
    assert says in str(caught.value)


def test_the_offset_of_what_is_refused_is_named(tmp_path):
    before = program(("w", b""))[:-2]
    with pytest.raises(FormatError, match=rf"refused: .* \(byte {len(before)}\)"):
        open_torch_file(archive(tmp_path / "f", before + SYSTEM + b"u."))


def test_a_bomb_of_references_and_of_depth_takes_no_time_and_no_memory(tmp_path):
    doubled = b")" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(200))  # 2²⁰⁰ in full
    deep = b")" + b"\x85" * 100_000
    itself = b"}\x94" + text("a") + b"h\x00s"
    for value in (doubled, deep, itself):
        with pytest.raises(FormatError, match="is not a tensor"):
            open_torch_file(archive(tmp_path / "f", b"\x80\x04}" + text("w") + value + b"s."))


def test_the_number_of_instructions_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAXIMUM_INSTRUCTIONS", 100)
    with pytest.raises(FormatError, match="more than 100 instructions"):
        open_torch_file(archive(tmp_path / "f", b"}" * 1000 + b"."))


# ------------------------------------------------------------------ the archive
def test_an_archive_that_torch_did_not_write_is_refused(tmp_path):
    good, path = program(("w", tensor())), tmp_path / "f"
    cases = {
        "is compressed": dict(compression=zipfile.ZIP_DEFLATED),
        "no single folder": dict(root="a/b"),
        "is a TorchScript": dict(extra=[("archive/constants.pkl", b"")]),
        "holds no single folder": dict(extra=[("other/data.pkl", b"")]),
        "control characters": dict(extra=[("archive/\x1b[2J", b"")]),
    }
    for says, options in cases.items():
        with pytest.raises(FormatError, match=says):
            open_torch_file(archive(path, good, **options))
    archive(path, good)
    raw = path.read_bytes()
    with pytest.raises(FormatError, match="little-endian"):
        path.write_bytes(raw.replace(b"little", b"bigend"))
        open_torch_file(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, good, extra=[("archive/data/0", b"")])
    with pytest.raises(FormatError, match="twice"):
        open_torch_file(path)


def test_damage_is_noticed(tmp_path):
    path = archive(tmp_path / "f", program(("w", tensor())))
    raw = path.read_bytes()
    at = raw.index(VALUES.tobytes())
    path.write_bytes(raw[:at] + b"\x01" + raw[at + 1 :])
    with open_torch_file(path) as file, pytest.raises(FormatError, match="checksum"):
        file.read("w")
    for length in (0, 3, 100, len(raw) // 2, len(raw) - 30, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_torch_file(path)


def test_overlapping_entries_are_refused(tmp_path):
    """One entry's bytes counted many times is how a small archive becomes a large one."""
    path = archive(tmp_path / "f", program(("w", tensor())), extra=[("archive/x", b"12345678")])
    raw = bytearray(path.read_bytes())
    last = raw.rindex(b"PK\x01\x02")
    first = raw.index(b"PK\x01\x02")
    raw[last + 42 : last + 46] = raw[first + 42 : first + 46]
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="overlaps"):
        open_torch_file(path)


def test_a_table_of_contents_of_gigabytes_is_not_believed(tmp_path):
    path = archive(tmp_path / "f", program(("w", tensor())))
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 12 : end + 16] = struct.pack("<I", 2**31)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="table of contents claims"):
        open_torch_file(path)


def test_other_files_are_called_by_their_name(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(torch_file._OLD_MAGIC + b"rest of an old file")
    with pytest.raises(FormatError, match="torch before 1.6"):
        open_torch_file(path)
    path.write_bytes(b"not at all")
    with pytest.raises(FormatError, match="not a torch file"):
        open_torch_file(path)
    with pytest.raises(FormatError, match="regular file"):
        open_torch_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_torch_file(tmp_path / "missing")


@given(st.data())
def test_no_change_of_bytes_gives_anything_but_the_file_or_a_format_error(tmp_path_factory, data):
    path = archive(tmp_path_factory.mktemp("t") / "f", program(("w", tensor())))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        assert all(array.nbytes <= 48 for array in load(path).values())
    except FormatError:
        pass


@given(st.binary(max_size=60))
def test_no_pickle_gives_anything_but_tensors_or_a_format_error(pickle):
    try:
        assert all(map(str, torch_pickle.tensors_of(pickle, "f", "data.pkl")))
    except FormatError:
        pass
