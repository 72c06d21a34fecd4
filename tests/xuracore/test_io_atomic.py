"""A write that fails or is killed leaves the old file, byte for byte."""

import errno
import os
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from xuracore.errors import FormatError
from xuracore.io import atomic, load_safetensors, save_json, save_safetensors
from xuracore.io.atomic import write_atomically


class FaultyOs:
    """``os`` whose k-th call of a writing function fails; before that every write is cut short."""

    WATCHED = ("open", "write", "fsync", "close", "replace")

    def __init__(self, fail_at):
        self.calls, self.fail_at, self.failed = 0, fail_at, None

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in self.WATCHED:
            return function

        def called(*arguments):
            self.calls += 1
            if self.calls == self.fail_at:
                self.failed = name
                raise OSError(errno.ENOSPC, "injected")
            if name == "write":
                return os.write(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
            return function(*arguments)

        return called


WRITERS = {
    "bytes": lambda path, new: write_atomically(path, [b"some ", b"" if new else b"old", b"bytes"]),
    "json": lambda path, new: save_json(path, {"new": new}),
    "safetensors": lambda path, new: save_safetensors(path, {"x": np.full(3, float(new)), "y": np.zeros(0)}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failure_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, writer):
    write, path = WRITERS[writer], tmp_path / "file"
    write(path, new=True)
    new = path.read_bytes()
    write(path, new=False)
    old = path.read_bytes()
    failed = []
    for fail_at in range(1, 1000):
        faulty = FaultyOs(fail_at)
        monkeypatch.setattr(atomic, "os", faulty)
        try:
            write(path, new=True)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        finally:
            monkeypatch.undo()
        failed.append(faulty.failed)
        renamed = "replace" in failed and faulty.failed != "replace"
        assert path.read_bytes() == (new if renamed else old)
        assert os.listdir(tmp_path) == ["file"]
        write(path, new=False)
    assert path.read_bytes() == new
    assert failed[0] == "open" and failed[-2:] == ["fsync", "close"] and failed.count("write") > 3
    assert failed.count("fsync") == 2 and failed.count("replace") == 1


def test_bytes_that_the_disk_changes_are_noticed(tmp_path, monkeypatch):
    save_json(tmp_path / "file", "old")

    class LyingOs(FaultyOs):
        def __getattr__(self, name):
            if name == "write":
                return lambda descriptor, chunk: os.write(descriptor, bytes(len(chunk)))
            return getattr(os, name)

    monkeypatch.setattr(atomic, "os", LyingOs(0))
    with pytest.raises(FormatError, match="differs from what was written"):
        save_json(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == '"old"\n'
    assert os.listdir(tmp_path) == ["file"]


def test_a_check_can_refuse_the_new_file(tmp_path):
    write_atomically(tmp_path / "file", [b"old"])

    def refuse(temporary):
        raise FormatError("no", temporary)

    with pytest.raises(FormatError):
        write_atomically(tmp_path / "file", [b"new"], refuse)
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_interruption_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "file", [b"old"])

    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", chunks())
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_atomically(tmp_path / "elsewhere" / "real", [b"old"])
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    write_atomically(tmp_path / "link", [b"new"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "real").read_bytes() == b"new"


def test_a_folder_or_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        write_atomically(tmp_path, [b"new"])
    with pytest.raises(FileNotFoundError, match="folder to write into does not exist: .*missing'"):
        write_atomically(tmp_path / "missing" / "file", [b"new"])


def test_a_new_file_is_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", [b"new"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_only_our_own_old_temporary_files_are_swept(tmp_path):
    def create(name, age):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)

    create(".file.123.0123abcd.xura-tmp", atomic.STALE_SECONDS + 60)
    create(".file.124.0123abcd.xura-tmp", 60)  # its writer may be at work
    create(".file.123.0123abcd.tmp", 10**6)
    create("file.123.0123abcd.xura-tmp", 10**6)
    old_folder = tmp_path / ".step-00000001.1.00000000.xura-tmp"
    old_folder.mkdir()
    (old_folder / "part").write_text("x")
    os.utime(old_folder, (time.time() - 10**6,) * 2)
    write_atomically(tmp_path / "file", [b"new"])
    assert sorted(os.listdir(tmp_path)) == [
        ".file.123.0123abcd.tmp",
        ".file.124.0123abcd.xura-tmp",
        "file",
        "file.123.0123abcd.xura-tmp",
    ]


WRITER = """
import sys, numpy as np
from xuracore.io import save_safetensors
print("ready", flush=True)
for k in range(10**9):
    save_safetensors(sys.argv[1], {"x": np.full(20_000, k), "k": np.array(k)})
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path, rng = tmp_path / "file", np.random.default_rng(3)
    last = -1
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        if path.exists():
            loaded = load_safetensors(path)
            last = int(loaded["k"])
            assert (loaded["x"] == last).all() and loaded["x"].shape == (20_000,)
    assert last >= 0
