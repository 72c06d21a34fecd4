"""Checkpoint folders: whatever happens to the writer or the disk, a whole generation is loaded."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from xuracore.errors import ConfigError, DTypeError, FormatError
from xuracore.io import CheckpointDirectory, atomic, checkpoint, load_safetensors, save_json


def parts(step):
    """What a training run has at ``step``: every value says which step it belongs to."""
    return {
        "model": {"weight": np.full((4, 3), step, np.float32), "bias": np.zeros(3, np.float32)},
        "optimizer": {"weight.moment": np.full((4, 3), -step, np.float64)},
        "trainer": {"step": step, "rng": {"state": 2**127 + step}, "loss": [0.5, step]},
        "config": {"d_model": 3, "name": f"run at {step}"},
    }


def assert_is(checkpoint, step):
    expected = parts(step)
    assert checkpoint.step == step
    assert checkpoint.trainer == expected["trainer"] and checkpoint.config == expected["config"]
    for part in ("model", "optimizer"):
        loaded = getattr(checkpoint, part)
        assert loaded.keys() == expected[part].keys()
        for name, array in expected[part].items():
            np.testing.assert_array_equal(loaded[name], array, strict=True)


def saved(path, *steps, keep=3):
    directory = CheckpointDirectory(path, keep)
    for step in steps:
        directory.save(step, **parts(step))
    return directory


def test_a_checkpoint_holds_what_was_saved(tmp_path):
    directory = saved(tmp_path / "runs" / "a", 0, 100)
    assert_is(directory.load(), 100)
    assert_is(directory.load(0), 0)
    assert directory.steps() == [0, 100]
    folder = directory.load().path
    assert folder == tmp_path / "runs" / "a" / "step-00000100"
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    latest = json.loads((tmp_path / "runs" / "a" / "latest.json").read_text())
    assert latest["generation"] == "step-00000100" and latest["step"] == 100
    assert latest["manifest"] == atomic.digest_file(folder / "manifest.json")._asdict()
    assert load_safetensors(folder).keys() == {"weight", "bias"}  # a generation is a model folder


def test_parts_that_were_not_saved_are_none(tmp_path):
    directory = CheckpointDirectory(tmp_path)
    directory.save(3, {"w": np.zeros(2)})
    checkpoint = directory.load()
    assert checkpoint.model.keys() == {"w"}
    assert (checkpoint.optimizer, checkpoint.trainer, checkpoint.config) == (None, None, None)


def test_the_last_saved_generations_are_kept(tmp_path):
    directory = saved(tmp_path, 100, 200, 300, 400)
    assert directory.steps() == [200, 300, 400]
    directory.save(250, **parts(250))  # a run that went back: what was saved last counts
    assert directory.steps() == [250, 300, 400]
    assert_is(directory.load(), 250)
    assert_is(CheckpointDirectory(tmp_path, keep=1).load(), 250)
    saved(tmp_path, 500, keep=1)
    assert directory.steps() == [500]
    assert sorted(os.listdir(tmp_path)) == ["latest.json", "step-00000500"]


def test_saving_a_step_again_replaces_its_generation(tmp_path):
    directory = saved(tmp_path, 100, 200)
    changed = parts(200) | {"config": {"second": True}}
    directory.save(200, **changed)
    assert directory.load().config == directory.load(200).config == {"second": True}
    assert directory.steps() == [100, 200] and len(os.listdir(tmp_path)) == 3
    directory.save(200, **parts(200))
    assert_is(directory.load(200), 200)
    assert len(os.listdir(tmp_path)) == 3


def damages(path):
    content = path.read_bytes()
    yield "gone", None
    yield "empty", b""
    yield "cut", content[:-1]
    yield "one bit", bytes([content[0] ^ 1]) + content[1:]
    yield "longer", content + b" "


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "manifest.json"]
)
def test_a_damaged_generation_is_passed_over_and_named(tmp_path, file):
    directory = saved(tmp_path / "whole", 100, 200)
    for damage, content in damages(tmp_path / "whole" / "step-00000200" / file):
        path = shutil.copytree(tmp_path / "whole", tmp_path / damage)
        if content is None:
            (path / "step-00000200" / file).unlink()
        else:
            (path / "step-00000200" / file).write_bytes(content)
        directory = CheckpointDirectory(path)
        with pytest.warns(RuntimeWarning, match=f"going back to step-00000100: .*{file}") as caught:
            assert_is(directory.load(), 100)
        assert len(caught) == 1 and caught[0].filename == __file__
        with pytest.raises(FormatError, match=f"no checkpoint of step 200 that is whole; .*{file}"):
            directory.load(200)


def test_any_flipped_bit_of_a_generation_is_noticed(tmp_path):
    directory, rng = saved(tmp_path, 100, 200), random.Random(2)
    files = [path for path in (tmp_path / "step-00000200").iterdir() if path.is_file()]
    for _ in range(100):
        path = rng.choice(files)
        content = path.read_bytes()
        position = rng.randrange(len(content))
        flipped = bytes([content[position] ^ (1 << rng.randrange(8))])
        path.write_bytes(content[:position] + flipped + content[position + 1 :])
        with pytest.warns(RuntimeWarning, match="going back to step-00000100"):
            assert_is(directory.load(), 100)
        path.write_bytes(content)
    assert_is(directory.load(), 200)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"generation": 7}', b'{"generation": "../x"}'])
def test_without_latest_the_newest_whole_generation_is_loaded(tmp_path, content):
    directory = saved(tmp_path, 100, 300, 200)
    if content is None:
        (tmp_path / "latest.json").unlink()
    else:
        (tmp_path / "latest.json").write_bytes(content)
    assert_is(directory.load(), 200)
    assert_is(saved(tmp_path, 400).load(), 400)


def test_a_manifest_must_say_what_it_should(tmp_path):
    directory = saved(tmp_path, 100)
    path = tmp_path / "step-00000100" / "manifest.json"
    manifest = json.loads(path.read_text())
    (tmp_path / "latest.json").unlink()
    digest = {"bytes": 1, "sha256": "0" * 64}
    for change, reason in [
        ({"format": "other"}, "format is 'other'"),
        ({"step": -1}, "step is not"),
        ({"serial": True}, "serial is not"),
        ({"files": {}}, "no model.safetensors"),
        ({"files": {"model.safetensors": 1}}, "lacks its digest"),
        ({"files": {"model.safetensors": digest, "../x": digest}}, "files are not among"),
        ({"more": 1}, "expected the keys"),
    ]:
        save_json(path, manifest | change)
        with pytest.raises(FormatError, match=reason):
            directory.load()
    save_json(path, manifest)
    assert_is(directory.load(), 100)


def test_an_empty_or_missing_directory_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FormatError, match="holds no checkpoint"):
            CheckpointDirectory(path).load()
        assert CheckpointDirectory(path).steps() == []
    with pytest.raises(FormatError, match=r"no checkpoint of step 7; there are steps \[100\]"):
        saved(tmp_path, 100).load(7)


def test_other_files_beside_the_generations_are_left_alone(tmp_path):
    for name in ("step-1", "step-00000001x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000050").mkdir()  # looks like a generation, but holds none
    directory = saved(tmp_path, 100, 200, keep=1)
    assert_is(directory.load(), 200)
    assert sorted(os.listdir(tmp_path)) == [
        "latest.json", "notes", "step-00000001x", "step-00000050", "step-00000200", "step-1",
    ]  # fmt: skip


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", None, np.int64(1), 10**15])
def test_a_step_is_a_whole_number(tmp_path, step):
    with pytest.raises(ConfigError, match="step is"):
        CheckpointDirectory(tmp_path).save(step, {})


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_is_at_least_one(tmp_path, keep):
    with pytest.raises(ConfigError, match="keep is"):
        CheckpointDirectory(tmp_path, keep)


def test_a_part_that_cannot_be_saved_changes_nothing(tmp_path):
    directory = saved(tmp_path, 100)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DTypeError):
        directory.save(200, **parts(200) | {"optimizer": {"x": np.array(["text"])}})
    with pytest.raises(FormatError):
        directory.save(200, **parts(200) | {"trainer": {"loss": float("nan")}})
    assert sorted(os.listdir(tmp_path)) == before
    assert_is(directory.load(), 100)


class Dead(BaseException):
    """Nothing the process does after this reaches the disk: it was killed."""


class Fault:
    """Lets the k-th call that changes the disk fail; with ``dead``, every later one as well."""

    CALLS = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")

    def __init__(self, fail_at, dead):
        self.calls, self.fail_at, self.dead, self.failed = 0, fail_at, dead, None

    def patch(self, monkeypatch):
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, function):
        def called(*arguments, **keywords):
            self.calls += 1
            if self.calls == self.fail_at:
                self.failed = name
            if self.calls == self.fail_at or (self.dead and self.failed):
                raise Dead if self.dead else OSError(errno.ENOSPC, "injected")
            return function(*arguments, **keywords)

        return called


@pytest.mark.parametrize("dead", [False, True], ids=["fails", "is killed"])
def test_a_writer_that_stops_at_any_call_loses_nothing(tmp_path, monkeypatch, dead):
    seen = set()
    saved(tmp_path / "before", 100, 200)
    for fail_at in range(1, 1000):
        path = shutil.copytree(tmp_path / "before", tmp_path / str(fail_at))
        directory, fault = CheckpointDirectory(path, keep=2), Fault(fail_at, dead)
        with monkeypatch.context() as patched, contextlib.suppress(OSError, Dead):
            fault.patch(patched)
            directory.save(300, **parts(300))
        if fault.failed is None:
            break
        seen.add(fault.failed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that is listed is damaged
            assert directory.load().step in (200, 300)
            for step in directory.steps():
                assert_is(directory.load(step), step)
        assert 200 in directory.steps()
        if not dead and fault.failed not in ("unlink", "rmdir"):
            assert not [name for name in os.listdir(path) if name.endswith(".xura-tmp")]
        if fail_at % 8 == 0:
            directory.save(400, **parts(400))
            assert_is(directory.load(), 400)
    assert seen == set(Fault.CALLS) and fail_at > 30
    assert_is(directory.load(), 300)


def test_a_generation_is_on_the_disk_before_latest_names_it(tmp_path, monkeypatch):
    events = []

    def replace(source, target, real=os.replace):
        events.append(os.path.basename(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(checkpoint, "sync_folder", lambda folder: events.append(("synced", folder)))
    saved(tmp_path, 100)
    generation = events.index("step-00000100")
    assert events[generation:] == ["step-00000100", ("synced", tmp_path), "latest.json"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_io_checkpoint import CheckpointDirectory, parts
directory = CheckpointDirectory(sys.argv[1], keep=2)
first = 1 + max(directory.steps(), default=0)
print("ready", flush=True)
for step in range(first, first + 10**6):
    directory.save(step, **parts(step))
    print(step, flush=True)
"""


def test_a_killed_run_resumes_from_a_whole_generation(tmp_path):
    directory, rng = CheckpointDirectory(tmp_path, keep=2), random.Random(4)
    step = 0
    for number in range(12):
        command = [sys.executable, "-c", WRITER, tmp_path, os.path.dirname(__file__)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        reported = writer.stdout.readline() if number == 0 else ""  # one save at least, on however busy a machine
        time.sleep(rng.uniform(0.01, 0.06))
        writer.kill()
        output, _ = writer.communicate()
        finished = max(map(int, (reported + output).split()), default=step)
        if directory.steps():
            loaded = directory.load()  # a warning would fail the test: nothing is damaged
            step = loaded.step
            assert_is(loaded, step)
        assert step >= finished  # what was reported as saved is there
    assert step > 0
    newest = max(each for each in directory.steps() if each != step + 1)  # may be whole, killed before it was named
    directory.save(step + 1, **parts(step + 1))
    assert directory.load().step == step + 1
    assert directory.steps() == sorted([step + 1, newest])  # what the killed had no time to remove is gone
