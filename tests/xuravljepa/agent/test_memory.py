"""Visual memory: what was completely written stays readable, whatever happens to the process or the file."""

import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xuracore.errors import ConfigError, FormatError, ShapeError
from xuravljepa.agent import memory_record as records
from xuravljepa.agent.errors import MemoryBusyError
from xuravljepa.agent.memory import MemoryConfig, VisualMemory

WIDTH = 6
ROOT = Path(__file__).parents[3]
OLD = {"sync": False, "max_age": 1e12}  # times here are those of 1970
FAST = MemoryConfig(**OLD)
DAY = 86400.0


def key(seed):
    return np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)


def picture(seed, side=4):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def opened(folder, config=FAST, **more):
    return VisualMemory(folder, WIDTH, config, **more)


def fill(folder, count, config=FAST, start=0, **more):
    with opened(folder, config, **more) as memory:
        for i in range(start, start + count):
            memory.add(key(i), picture(i), f"frame {i}", "what?", f"answer {i}", 0.5, time=1000.0 + i)
    return sorted(Path(folder).glob("*.log"))


def assert_whole(memory, numbers):
    assert [entry.number for entry in memory] == list(numbers)
    for entry in memory:
        i = entry.number
        assert (entry.source, entry.answer, entry.time) == (f"frame {i}", f"answer {i}", 1000.0 + i)
        assert np.array_equal(memory.picture(i), picture(i))
        assert memory.search(key(i), 1)[0][0] is entry


def quiet(folder, config=FAST, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return opened(folder, config, **more)


# ---------------------------------------------------------------------- round trip
def test_what_was_remembered_is_there_again(tmp_path):
    fill(tmp_path, 40)
    with opened(tmp_path) as memory:
        assert_whole(memory, range(40))
        assert memory.add(key(40), picture(40)).number == 40
    with opened(tmp_path) as memory:
        assert len(memory) == 41


def test_nearest_first_within_a_span_of_time(tmp_path):
    with opened(tmp_path, MemoryConfig(same=0.0, **OLD)) as memory:
        for i in range(50):
            memory.add(key(i), picture(i), time=float(i))
        found = memory.search(key(7), 5)
        cosines = [cosine for _, cosine in found]
        assert found[0][0].number == 7 and cosines[0] == pytest.approx(1) and cosines == sorted(cosines)[::-1]
        assert all(10 <= entry.time <= 20 for entry, _ in memory.search(key(7), 50, since=10, until=20))
        assert [entry.number for entry in memory.newest(3, until=20)] == [20, 19, 18]


def test_a_frame_seen_again_is_one_memory_with_two_times(tmp_path):
    with opened(tmp_path) as memory:
        first = memory.add(key(0), picture(0), time=10)
        memory.add(key(1), picture(1), time=11)
        before = memory.bytes
        again = memory.add(key(0) * 3 + 1e-3, picture(2), time=20)
        assert again is first and memory.bytes - before < 200
    with opened(tmp_path) as memory:
        entry = memory.search(key(0), 1)[0][0]
        assert (len(memory), entry.time, entry.last, entry.seen) == (2, 10, 20, 2)
        assert memory.newest(1)[0] is entry


@pytest.mark.parametrize("bad", [np.zeros(WIDTH), np.full(WIDTH, np.nan), np.ones(WIDTH + 1), np.ones((1, WIDTH))])
def test_keys_without_direction_are_refused(tmp_path, bad):
    with opened(tmp_path) as memory:
        for use in (lambda: memory.add(bad, picture(0)), lambda: memory.search(bad)):
            with pytest.raises(ShapeError):
                use()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with opened(tmp_path) as memory:
        for wrong in ({"time": float("nan")}, {"confidence": 1.5}, {"confidence": float("nan")},
                      {"picture": picture(0, 800)}):
            with pytest.raises(ShapeError):
                memory.add(key(0), **({"picture": picture(0)} | wrong))
        memory.add(key(0), picture(0), "\ud800" + "x" * 5000, "\x00\n", "é")
    with opened(tmp_path) as memory:
        assert (len(memory), len(next(iter(memory)).source), next(iter(memory)).answer) == (1, 2000, "é")


@pytest.mark.parametrize("wrong", [{"same": -1}, {"max_age": 0}, {"segment_bytes": 0}, {"max_bytes": 10},
                                   {"max_index": 0}, {"segment_bytes": 2**40}])
def test_limits_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        MemoryConfig(**wrong)


# ---------------------------------------------------------------------- damage
def test_cut_at_every_byte_all_whole_records_are_readable(tmp_path):
    (path,) = fill(tmp_path / "whole", 2)
    content = path.read_bytes()
    ends = [behind for _, _, _, behind in records.scan(content)]
    for size in range(len(content) + 1):
        folder = tmp_path / "cut"
        folder.mkdir()
        (folder / path.name).write_bytes(content[:size])
        whole, torn = sum(end <= size for end in ends), size not in (0, *ends)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            memory = opened(folder)
        assert len(said) == torn and all("cut off" in str(warning.message) for warning in said)
        with memory:
            assert_whole(memory, range(whole))
            memory.add(key(9), picture(9))
        with opened(folder) as memory:  # without a warning: nothing torn was left behind
            assert len(memory) == whole + 1
        shutil.rmtree(folder)


def test_one_flipped_bit_costs_one_record_at_most(tmp_path):
    (path,) = fill(tmp_path, 4)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(content), 150):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << int(place % 8)
        path.write_bytes(damaged)
        with quiet(tmp_path, read_only=True) as memory:
            assert len(memory) == 3
        with quiet(tmp_path) as memory:
            assert len(memory) == 3
            numbers = [memory.add(key(50), picture(50), "frame 50", time=1050.0).number]
        with quiet(tmp_path) as memory:
            assert [entry.number for entry in memory][-1:] == numbers and len(memory) == 4


@settings(max_examples=25)
@given(st.data())
def test_bytes_of_strangers_never_break_it(tmp_path_factory, data):
    """Any bytes, also those with right checksums around wrong content: kept out, and writing goes on."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = b"".join(path.read_bytes() for path in fill(folder, 2))
    junk = st.one_of(st.binary(max_size=60), st.just(whole), st.just(records.MARK), st.builds(
        lambda about, tail: sealed(struct.pack("<I", len(about)) + about + tail),
        st.one_of(st.binary(max_size=20), st.recursive(
            st.none() | st.integers() | st.text(max_size=3),
            lambda inner: st.dictionaries(st.sampled_from(
                ["version", "eyes", "width", "number", "time", "source", "again", "answer"]), inner)
        ).map(lambda value: json.dumps(value).encode())), st.binary(max_size=30)))
    next(folder.glob("*.log")).write_bytes(b"".join(data.draw(st.lists(junk, max_size=5))))
    with quiet(folder) as memory:
        known = len(memory)
        memory.add(key(77), picture(77))
    with quiet(folder) as memory:
        assert len(memory) == known + 1


def sealed(payload):
    checksum = zlib.crc32(payload, zlib.crc32(struct.pack("<I", len(payload))))
    return records.HEAD.pack(records.MARK, len(payload), checksum) + payload


def test_a_file_made_of_marks_ends_soon_and_is_left_alone(tmp_path):
    (path,) = fill(tmp_path, 1)
    hostile = path.read_bytes() + records.HEAD.pack(records.MARK, 2**19, 1) * 200_000
    path.write_bytes(hostile)
    with quiet(tmp_path) as memory:
        assert len(memory) == 1
        memory.add(key(3), picture(3))
    assert path.read_bytes() == hostile
    with quiet(tmp_path) as memory:
        assert len(memory) == 2


def test_a_record_damaged_later_is_an_error_when_its_picture_is_wanted(tmp_path):
    (path,) = fill(tmp_path, 2)
    with opened(tmp_path) as memory:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError, match="damaged"):
            memory.picture(1)
        with pytest.raises(FormatError, match="no memory number 9"):
            memory.picture(9)
        assert np.array_equal(memory.picture(0), picture(0))
        path.unlink()
        with pytest.raises(FormatError, match="cannot be read"):
            memory.picture(0)


def test_a_memory_of_other_eyes_is_refused_and_untouched(tmp_path):
    (path,) = fill(tmp_path, 2, eyes="mine")
    content = path.read_bytes()
    for other in (lambda: opened(tmp_path, eyes="yours"), lambda: VisualMemory(tmp_path, WIDTH + 1, eyes="mine"),
                  lambda: opened(tmp_path / "missing", read_only=True)):
        with pytest.raises(FormatError):
            other()
    assert path.read_bytes() == content
    opened(tmp_path, eyes="mine").close()  # the refused ones let go of the lock


def test_a_full_disk_leaves_the_records_before(tmp_path, monkeypatch):
    (path,) = fill(tmp_path, 2)
    with opened(tmp_path) as memory:
        write, calls = os.write, []

        def full(file, data):
            calls.append(len(data))
            if len(calls) == 1:
                return write(file, data[:40])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            memory.add(key(8), picture(8))
        monkeypatch.undo()
        assert_whole(memory, range(2))
        memory.add(key(9), picture(9))
    with opened(tmp_path) as memory:
        assert len(memory) == 3


# ---------------------------------------------------------------------- segments and retention
def test_segments_rotate_and_the_oldest_go_when_it_is_too_much(tmp_path):
    config = MemoryConfig(segment_bytes=1500, max_bytes=6000, **OLD)
    fill(tmp_path, 60, config)
    files = sorted(tmp_path.glob("*.log"))
    assert sum(file.stat().st_size for file in files) <= 6000 and 3 <= len(files) <= 5
    with opened(tmp_path, config) as memory:
        first = next(iter(memory)).number
        assert first > 20
        assert_whole(memory, range(first, 60))
        assert memory.bytes == sum(file.stat().st_size for file in files)


def test_what_is_too_old_goes(tmp_path):
    config = MemoryConfig(max_age=10 * DAY, sync=False)
    for day in range(30):
        with opened(tmp_path, config, clock=lambda day=day: day * DAY) as memory:
            memory.add(key(day), picture(day))
    with opened(tmp_path, config, clock=lambda: 29 * DAY) as memory:
        days = [entry.time / DAY for entry in memory]
        assert days[-1] == 29 and 17 <= days[0] <= 19.5
        assert memory.enforce_retention(now=100 * DAY) and len(memory) == 0
        memory.add(key(0), picture(0))
    assert len(list(tmp_path.glob("*.log"))) == 1


def test_the_index_is_bounded(tmp_path):
    config = MemoryConfig(max_index=16, **OLD)
    fill(tmp_path, 60, config)
    with opened(tmp_path, config) as memory:
        assert 13 <= len(memory) <= 16
        assert_whole(memory, range(60 - len(memory), 60))


# ---------------------------------------------------------------------- one writer, many readers
def test_one_writes_and_others_read(tmp_path):
    with opened(tmp_path) as memory:
        memory.add(key(0), picture(0), "frame 0", "", "answer 0", time=1000.0)
        with pytest.raises(MemoryBusyError, match="read_only"):
            opened(tmp_path)
        reader = opened(tmp_path, read_only=True)
        assert_whole(reader, [0])
        with pytest.raises(MemoryBusyError):
            reader.add(key(1), picture(1))
    with pytest.raises(MemoryBusyError):
        memory.add(key(1), picture(1))
    opened(tmp_path).close()


def test_a_process_that_is_killed_lets_go_of_the_lock(tmp_path):
    code = (f"import sys; sys.path[:0] = {[str(ROOT)]!r}\n"
            "from xuravljepa.agent.memory import VisualMemory\n"
            "import numpy as np, time\n"
            f"memory = VisualMemory({str(tmp_path)!r}, {WIDTH})\n"
            f"memory.add(np.ones({WIDTH}), np.zeros((4, 4, 3), np.uint8)); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MemoryBusyError):
            opened(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with opened(tmp_path) as memory:
        assert len(memory) == 1


def test_killed_writers_lose_nothing_that_was_complete(tmp_path):
    path = ROOT / "tests" / "campaigns" / "memory_kills.py"
    specification = importlib.util.spec_from_file_location("memory_kills", path)
    campaign = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(campaign)
    reported, lost, _, _ = campaign.kill_writers(tmp_path, 12, random.Random(0))
    assert reported > 0 and lost == 0
