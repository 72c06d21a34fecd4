"""Break files and writers on purpose, and count what survives:  python tests/campaigns/faults.py --help

Every number printed is a count of trials and of those that ended otherwise than they should: a file or
checkpoint that is torn, an exception that is not the promised one, a load that takes over a second, or
memory and open files that grow.  Exit status 1 if any did.  A short version runs in the test suite.
"""

import argparse
import copy
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from xuracore.errors import FormatError
from xuracore.io import CheckpointDirectory, load_safetensors, save_safetensors

CALLS = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir")


def parts(step, size=64):
    """What a run has at ``step``; every value says which step it belongs to."""
    return {
        "model": {"weight": np.full((size, size), step, np.float32), "bias": np.zeros(3, np.float32)},
        "optimizer": {"weight.moment": np.full((size, size), -step, np.float64)},
        "trainer": {"step": step, "loss": [0.5, step]},
        "config": {"name": f"run at {step}"},
    }


def is_whole(checkpoint):
    """Whether all parts of a checkpoint belong to its step."""
    step, expected = checkpoint.step, parts(checkpoint.step)
    return (
        np.array_equal(checkpoint.model["weight"], expected["model"]["weight"])
        and np.array_equal(checkpoint.optimizer["weight.moment"], expected["optimizer"]["weight.moment"])
        and checkpoint.trainer == expected["trainer"]
        and checkpoint.config["name"] == f"run at {step}"
    )


def write_for_ever(folder, pipe):
    """Save generations until killed, writing the number of each one into the pipe when it is done."""
    directory = CheckpointDirectory(folder, keep=2)
    first = 1 + max(directory.steps(), default=0)
    for step in range(first, first + 10**6):
        directory.save(step, **parts(step))
        os.write(pipe, f"{step} ".encode())


def kill_writers(folder, count, rng):
    """SIGKILL a writing process ``count`` times; each time what it reported as saved must load whole."""
    failed = saved = 0
    directory = CheckpointDirectory(folder, keep=2)
    for _ in range(count):
        reading, writing = os.pipe()
        writer = os.fork()
        if not writer:
            write_for_ever(folder, writing)
        os.close(writing)
        time.sleep(rng.uniform(0.0, 0.8))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        with open(reading) as output:
            saved = max(map(int, output.read().split()), default=saved)
        if directory.steps():
            checkpoint = directory.load()
            failed += not is_whole(checkpoint) or checkpoint.step < saved
    return count, failed, f"{saved} generations saved between the kills"


def fail_each_call(folder):
    """Let each call that changes the disk fail once, the k-th for all k; the generation before must stay whole."""
    failed, at = 0, 0
    originals = {name: getattr(os, name) for name in CALLS}
    base = folder / "before"
    CheckpointDirectory(base, keep=2).save(1, **parts(1))
    while True:
        at += 1
        path = shutil.copytree(base, folder / "now")
        count = [0]

        def failing(name, count=count, at=at):
            def called(*arguments, **keywords):
                count[0] += 1
                if count[0] == at:
                    raise OSError(errno.ENOSPC, "injected")
                return originals[name](*arguments, **keywords)

            return called

        for name in CALLS:
            setattr(os, name, failing(name))
        try:
            CheckpointDirectory(path, keep=2).save(2, **parts(2))
        except OSError:
            pass
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
        checkpoint = CheckpointDirectory(path).load()
        failed += not is_whole(checkpoint) or 1 not in CheckpointDirectory(path).steps()
        shutil.rmtree(path)
        if count[0] < at:
            return at, failed, "calls of " + ", ".join(CALLS)


def sample():
    """Named arrays of every kind the format knows."""
    rng = np.random.default_rng(5)
    return {
        "embedding.weight": rng.standard_normal((32, 16)).astype(np.float32),
        "layers.0.bias": rng.standard_normal(7),
        "mask": rng.random(9) > 0.5,
        "counts": rng.integers(0, 99, (3, 3)),
        "empty": np.zeros((0, 4), np.float16),
        "half": rng.standard_normal(6).astype(np.float16),
        "brain": rng.integers(0, 2**15, 8).astype(np.uint16),
        "scale": np.array(2.0, np.float32),
    }


def attempt(path, watch_memory=True):
    """``(arrays or None, well-behaved)``: nothing but FormatError, under a second, in memory of twice the file."""
    if watch_memory:
        tracemalloc.start()
    start, loaded, good = time.process_time(), None, True
    try:
        loaded = load_safetensors(path)
    except FormatError:
        pass
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        good = False
    good &= time.process_time() - start < 1
    if watch_memory:
        good &= tracemalloc.get_traced_memory()[1] < 2 * os.path.getsize(path) + 200_000
        tracemalloc.stop()
    return loaded, good


def damage(folder, flips, rng):
    """Cut a file at every 64th, and flip single bits of it: refused, or other values of the same size."""
    path, tree = folder / "t.safetensors", sample()
    save_safetensors(path, tree, {"k": "v"}, bfloat16=["brain"])
    whole = path.read_bytes()
    failed = refused = 0
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        loaded, good = attempt(path)
        failed += loaded is not None or not good
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        loaded, good = attempt(path)
        refused += loaded is None
        failed += not good
    return 64 + flips, failed, f"64 cuts, all refused; {flips} flips, {refused} of them seen without a checksum"


def mutated(header, rng):
    """A header with one to three things about it wrong, or the bytes of one with some changed."""
    header = json.loads(json.dumps(header))
    values = [None, True, -1, 2**63, 2**70, 1.5, "", "F32", "é", [], {}, [0, 8], [[]], "\x00", float("nan")]

    def odd():
        return copy.deepcopy(rng.choice(values))

    for _ in range(rng.randint(1, 3)):
        names = [name for name in header if isinstance(header[name], dict)] or ["x"]
        name, kind = rng.choice(names), rng.randrange(6)
        fields = header.setdefault(name, {})
        if not isinstance(fields, dict):
            continue
        if kind == 0:
            fields[rng.choice(["dtype", "shape", "data_offsets", "more"])] = odd()
        elif kind == 1 and isinstance(fields.get("data_offsets"), list) and fields["data_offsets"]:
            offsets = fields["data_offsets"]
            offsets[rng.randrange(len(offsets))] = rng.choice([odd(), rng.randrange(-9, 4000)])
        elif kind == 2 and isinstance(fields.get("shape"), list):
            fields["shape"].insert(0, rng.choice([odd(), rng.randrange(-2, 2**50)]))
        elif kind == 3:
            header[rng.choice(["x", "", "__metadata__", "a" * 600])] = odd()
        elif kind == 4:
            header.pop(name)
        else:
            fields["dtype"] = rng.choice(["F32", "F64", "BF16", "BOOL", "U8", "F4", "f32"])
    text = bytearray(json.dumps(header).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def fuzz_headers(folder, count, rng):
    """``count`` files with damaged headers: arrays or FormatError, nothing else, and in time."""
    path = folder / "t.safetensors"
    save_safetensors(path, sample(), {"k": "v"}, bfloat16=["brain"])
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    failed = accepted = 0
    for trial in range(count):
        text = mutated(header, rng)
        claimed = len(text) if rng.random() < 0.95 else rng.choice([0, 1, len(text) - 1, 2**32, 2**63])
        path.write_bytes(claimed.to_bytes(8, "little") + text + data)
        loaded, good = attempt(path, watch_memory=trial % 100 == 0)
        accepted += loaded is not None
        failed += not good
    return count, failed, f"{accepted} still described the data and were read"


def soak(folder, minutes):
    """Train a small model, with a checkpoint every 50 steps, and watch memory and open files."""
    import xuracore as xc
    from training.optim import AdamW
    from xuramamba import LanguageModel, LanguageModelConfig

    rng = np.random.default_rng(0)
    config = LanguageModelConfig(29, 16, 2, "mamba3", {"d_state": 8, "headdim": 8})
    model = LanguageModel(config, rng=rng)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    directory = CheckpointDirectory(folder / "soak", keep=2)
    end, step, after_warm_up, last = time.monotonic() + 60 * minutes, 0, None, (0, 0)
    while time.monotonic() < end or step < 200:
        ids = rng.integers(0, 29, (4, 24))
        logits, _ = model(ids[:, :-1])
        loss = xc.ops.cross_entropy(logits.reshape(-1, 29), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            state = {name: parameter.numpy() for name, parameter in model.named_parameters()}
            directory.save(step, state, trainer={"loss": loss.item()})
            if directory.load().step != step:
                return step, 1, "a checkpoint that was just saved did not load"
            last = memory_and_files()
            if step == 200:
                after_warm_up = last
    grown, files = last[0] - after_warm_up[0], last[1] - after_warm_up[1]
    failed = (grown > 8) + (files > 0) + (not np.isfinite(loss.item()))
    detail = f"{minutes:g} min, {step // 50} checkpoints, resident {after_warm_up[0]:.1f} → {last[0]:.1f} MiB"
    return step, failed, f"{detail}, open files {after_warm_up[1]} → {last[1]}"


def memory_and_files():
    """Resident MiB and open files of this process; the highest resident size where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0


def campaign(kills, flips, fuzz, soak_minutes, seed=0):
    """Rows ``(what, trials, failures, detail)`` of all parts that were asked for."""
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        for what, run in {
            "SIGKILL while checkpoints are written": kills and (lambda f: kill_writers(f, kills, rng)),
            "each system call of a save fails": kills and fail_each_call,
            "file cut, bits flipped": flips and (lambda f: damage(f, flips, rng)),
            "header fuzzed": fuzz and (lambda f: fuzz_headers(f, fuzz, rng)),
            "training soaked (steps)": soak_minutes is not None and (lambda f: soak(f, soak_minutes)),
        }.items():
            if run:
                place = Path(tempfile.mkdtemp(dir=folder))
                rows.append((what, *run(place)))
                shutil.rmtree(place)
    return rows


def main(arguments=None):
    """Run what is asked for and print a Markdown table; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="writers to kill (0: also no failing calls)")
    parser.add_argument("--flips", type=int, default=1000, help="bits to flip, one in each trial")
    parser.add_argument("--fuzz", type=int, default=100_000, help="headers to damage")
    parser.add_argument("--soak-minutes", type=float, help="train this long (default: not at all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = campaign(options.kills, options.flips, options.fuzz, options.soak_minutes, options.seed)
    print("| what | trials | failures | detail |\n|---|--:|--:|---|")
    for what, trials, failures, detail in rows:
        print(f"| {what} | {trials} | {failures} | {detail} |")
    return int(any(failures for _, _, failures, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
