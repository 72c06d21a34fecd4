"""Kernels run in every surrounding: without Numba, without a cache, in threads, in forked children."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import xuracore
from xuracore import jit

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")
PACKAGE = Path(xuracore.__file__).parent

# A model's worth of kernels, forward and backward; the sums are compared with those of other processes.
MODEL = """
import numpy as np, xuracore as xc
from xuracore import jit
rng = np.random.default_rng(0)
x = xc.tensor(rng.standard_normal((3, 7, 8)), dtype=np.float32, requires_grad=True)
weight = xc.tensor(rng.standard_normal((8, 4)), dtype=np.float32, requires_grad=True)
y, _ = xc.ops.causal_conv1d(xc.ops.rms_norm(x), weight, silu=True)
y = xc.ops.gelu(xc.ops.layer_norm(y)) + xc.ops.softmax(y)
loss = xc.ops.cross_entropy(y.reshape(-1, 8), rng.integers(0, 8, 21))
loss.backward()
"""
REPORT = """
import sys
print("RESULT", jit.backend(), "numba" in sys.modules and sys.modules["numba"] is not None,
      loss.item(), np.abs(x.grad).sum(), np.abs(weight.grad).sum())
"""

# A kernel of its own, so that nothing else has compiled it.
KERNEL = """
import numpy as np
from xuracore import jit, threads
from xuracore.jit import kernel, prange

def square_numpy(x, out):
    out[...] = x * x

@kernel(twin=square_numpy, parallel=True)
def square(x, out):
    for i in prange(x.size):
        out[i] = x[i] * x[i]

def right(work=0, dtype=np.float32):
    x = np.arange(999, dtype=dtype)
    out = np.empty_like(x)
    square.sized(work)(x, out)
    return np.array_equal(out, x * x)
"""


def python(code, folder=None, **environment):
    """Run ``code`` as a file in a fresh Python; the completed process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XURA", "NUMBA"))}
    kept |= {"PYTHONPATH": str(PACKAGE.parent), "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if folder is None:
        command = [sys.executable, "-c", code]
    else:
        (folder / "program.py").write_text(code)
        command = [sys.executable, str(folder / "program.py")]
    return subprocess.run(
        command, cwd=folder or os.sep, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def result_of(process):
    assert process.returncode == 0, process.stderr
    line = next(line for line in process.stdout.splitlines() if line.startswith("RESULT"))
    backend, numba, *numbers = line.split()[1:]
    return backend, numba == "True", [float(number) for number in numbers]


@pytest.fixture(scope="module")
def in_numpy():
    """Backend, whether Numba was imported, and the numbers, with XURA_KERNELS=numpy."""
    return result_of(python(MODEL + REPORT, XURA_KERNELS="numpy"))


# ---------------------------------------------------------------------- with and without Numba
def test_numpy_mode_imports_no_numba(in_numpy):
    assert in_numpy[:2] == ("numpy", False)


@needs_numba
def test_kernels_and_twins_agree(in_numpy):
    backend, numba, numbers = result_of(python(MODEL + REPORT))
    assert (backend, numba) == ("numba", True)
    assert numbers == pytest.approx(in_numpy[2], rel=1e-5)


ABSENT = {
    "not installed": """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
""",
    "halted": "import sys; sys.modules['numba'] = None",
}


@pytest.mark.parametrize("how", ABSENT)
def test_without_numba_the_twins_run(how, in_numpy):
    process = python(ABSENT[how] + MODEL + REPORT)
    assert result_of(process) == in_numpy and process.stderr == ""


def test_a_broken_numba_is_a_warning(tmp_path, in_numpy):
    """As when Numba is older than the NumPy beside it."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.2 or less')")
    process = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + MODEL + REPORT)
    assert result_of(process)[::2] == in_numpy[::2]
    assert process.stderr.count("RuntimeWarning: Numba cannot be imported (Numba needs NumPy 1.2") == 1


def test_settings_that_cannot_be_met_are_errors():
    process = python(ABSENT["not installed"] + MODEL, XURA_KERNELS="numba")
    assert "ConfigError: XURA_KERNELS=numba, but Numba cannot be imported" in process.stderr
    process = python(MODEL, XURA_KERNELS="fortran")
    assert "ConfigError: XURA_KERNELS='fortran'; expected 'numba', 'numpy' or 'auto'" in process.stderr


# ---------------------------------------------------------------------- the cache on disk
COUNT = """
assert right() and right(dtype=np.float64)
dispatcher = square.compiled()
print("RESULT", jit.backend(), True, sum(dispatcher.stats.cache_hits.values()),
      sum(dispatcher.stats.cache_misses.values()))
"""


def hits_and_misses(process):
    return result_of(process)[2]


@needs_numba
def test_compiled_kernels_are_kept_and_a_damaged_cache_is_renewed(tmp_path):
    cache = tmp_path / "cache"
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, NUMBA_CACHE_DIR=str(cache))) == [0, 2]
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, NUMBA_CACHE_DIR=str(cache))) == [2, 0]
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    assert len([path for path in files if path.suffix == ".nbi"]) == 2  # an index for each signature
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    damaged = python(KERNEL + COUNT, tmp_path, NUMBA_CACHE_DIR=str(cache))
    assert hits_and_misses(damaged) == [0, 2] and damaged.stderr == ""
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, NUMBA_CACHE_DIR=str(cache))) == [2, 0]


@needs_numba
def test_without_a_folder_to_cache_in_kernels_work_and_warn(tmp_path):
    """Everything Numba would write to is a file here, which stops even the superuser."""
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "file").write_text("")
    nowhere = {name: str(tmp_path / "file" / "x") for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
    process = python(KERNEL + COUNT, tmp_path, **nowhere)
    assert hits_and_misses(process) == [0, 2]
    assert "RuntimeWarning: kernels are compiled anew in each process" in process.stderr
    assert "set NUMBA_CACHE_DIR" in process.stderr


@needs_numba
def test_a_cache_folder_that_vanishes_is_a_warning(tmp_path):
    cache = tmp_path / "cache"
    vanish = f"""
import shutil
square.compiled()
shutil.rmtree({str(cache)!r})
open({str(cache)!r}, "w").close()
"""
    process = python(KERNEL + vanish + COUNT, tmp_path, NUMBA_CACHE_DIR=str(cache))
    assert process.returncode == 0, process.stderr
    assert "RuntimeWarning: kernels are compiled anew" in process.stderr


@needs_numba
def test_several_processes_may_start_at_once(tmp_path):
    (tmp_path / "program.py").write_text(KERNEL + COUNT)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(PACKAGE.parent),
                                "XURA_KERNELS": "auto"}  # whatever the tests themselves run with
    command = [sys.executable, str(tmp_path / "program.py")]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    last = python(KERNEL + COUNT, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert hits_and_misses(last) == [2, 0]


@needs_numba
@pytest.mark.slow
def test_each_processor_has_builds_of_its_own(tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, **cache)) == [0, 2]
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, NUMBA_CPU_NAME="generic", **cache)) == [0, 2]
    assert hits_and_misses(python(KERNEL + COUNT, tmp_path, **cache)) == [2, 0]


@needs_numba
@pytest.mark.slow
def test_an_edited_device_function_compiles_its_kernels_again(tmp_path):
    calls = KERNEL.replace("import kernel, prange", "import device, kernel, prange").replace(
        "@kernel", "@device\ndef power(x):\n    return x * x\n\n@kernel"
    ).replace("out[i] = x[i] * x[i]", "out[i] = power(x[i])")
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert hits_and_misses(python(calls + COUNT, tmp_path, **cache)) == [0, 2]
    assert hits_and_misses(python(calls + COUNT, tmp_path, **cache)) == [2, 0]
    cubes = calls.replace("return x * x\n", "return x * x * x\n").replace("(out, x * x)", "(out, x * x * x)")
    assert hits_and_misses(python(cubes + COUNT, tmp_path, **cache)) == [0, 2]


@needs_numba
@pytest.mark.slow
def test_a_compiler_killed_at_any_write_leaves_a_usable_cache(tmp_path):
    for number, step in enumerate(("_save_index", "_save_data")):
        cache = {"NUMBA_CACHE_DIR": str(tmp_path / f"cache{number}")}
        killed = f"""
import os, signal
from numba.core.caching import IndexDataCacheFile
IndexDataCacheFile.{step} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
right()
"""
        assert python(KERNEL + killed, tmp_path, **cache).returncode == -9
        assert hits_and_misses(python(KERNEL + COUNT, tmp_path, **cache)) == [0, 2]
        assert hits_and_misses(python(KERNEL + COUNT, tmp_path, **cache)) == [2, 0]


@needs_numba
@pytest.mark.slow
def test_an_installation_that_is_read_only_caches_in_the_home_folder(tmp_path):
    (tmp_path / "__pycache__").write_text("")  # a file stops even the superuser from writing there
    home = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME")}
    for expected in ([0, 2], [2, 0]):
        process = python(KERNEL + COUNT, tmp_path, **home)
        assert hits_and_misses(process) == expected and process.stderr == ""


# ---------------------------------------------------------------------- threads and forks
@needs_numba
def test_two_threads_at_a_first_call_compile_once(tmp_path):
    code = KERNEL + """
import threading
gate, results = threading.Barrier(4), []
def call():
    gate.wait()
    results.append(right())
threads_ = [threading.Thread(target=call) for _ in range(4)]
for thread in threads_: thread.start()
for thread in threads_: thread.join()
assert results == [True] * 4
assert len(square.compiled().signatures) == 1
assert [first[:2] for first in jit.FIRST_CALLS] == [("square", "compiled")]
print("RESULT numba True")
"""
    assert result_of(python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")))[0] == "numba"


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_old_and_new_kernels(tmp_path):
    """Also where the parent's threads are running, which do not survive a fork."""
    code = KERNEL + """
import os, warnings
warnings.simplefilter("ignore")
assert right() and right(work=10**9)
child = os.fork()
if not child:
    os._exit(0 if right() and right(work=10**9) and right(10**9, np.float64) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert right(work=10**9)
print("RESULT numba True")
"""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "XURA_NUM_THREADS": "2"}
    assert result_of(python(code, tmp_path, **environment))[0] == "numba"


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_compiles(tmp_path):
    code = KERNEL + """
import os, threading, warnings
warnings.simplefilter("ignore")
started = threading.Event()
def compile_slowly():
    with jit._compile_lock:
        started.set()
        right()
thread = threading.Thread(target=compile_slowly)
thread.start()
started.wait()
child = os.fork()
if not child:
    os._exit(0 if right() and right(dtype=np.float64) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
thread.join()
print("RESULT numba True")
"""
    assert result_of(python(code, tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache")))[0] == "numba"


def test_importing_the_engine_imports_no_numba():
    process = python("import sys, xuracore; assert 'numba' not in sys.modules")
    assert process.returncode == 0, process.stderr


def test_a_kernel_runs_its_twin_in_numpy_mode(monkeypatch):
    monkeypatch.setattr(jit, "backend", lambda: "numpy")
    called = []
    kernel = jit.Kernel(lambda x: called.append("loops"), lambda x: called.append("twin"), False, jit.FMA)
    jit.KERNELS.remove(kernel)
    kernel(1)
    kernel.sized(10**9)(1)
    kernel.split(3, 10**9)(1)
    assert called == ["twin"] * 3
