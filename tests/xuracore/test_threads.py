"""One place decides how many threads run, and BLAS and kernels follow it."""

import os
import subprocess
import sys

import numpy as np
import pytest

import xuracore as xc
from xuracore import threads
from xuracore.errors import ConfigError


def python(code, **environment):
    """What a fresh Python prints."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XURA", "OPENBLAS", "OMP", "NUMBA_NUM"))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", None])
def test_a_number_of_threads_is_a_positive_integer(count):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        xc.set_num_threads(count)


def test_no_more_threads_than_processors():
    before = xc.get_num_threads()
    try:
        xc.set_num_threads(10_000)
        assert xc.get_num_threads() == threads.available_cpus()
    finally:
        xc.set_num_threads(before)


@pytest.mark.skipif(not threads.blas_is_controlled(), reason="this BLAS cannot be controlled")
def test_blas_and_kernels_are_set_together():
    before = xc.get_num_threads()
    try:
        for count in (1, threads.available_cpus()):
            xc.set_num_threads(count)
            assert xc.get_num_threads() == count
            assert threads.blas_threads() == count
            assert threads.parallel_allowed() == (count > 1)
    finally:
        xc.set_num_threads(before)


SHOW = "import xuracore, xuracore.threads as t; print(xuracore.get_num_threads(), t.blas_threads())"


@pytest.mark.skipif(not threads.blas_is_controlled(), reason="this BLAS cannot be controlled")
def test_the_environment_sets_both_from_the_start():
    assert python(SHOW, XURA_NUM_THREADS="1", OPENBLAS_NUM_THREADS="2") == ["1", "1"]
    assert python(SHOW, OPENBLAS_NUM_THREADS="1") == [str(threads.available_cpus()), "1"]
    assert python(SHOW, XURA_NUM_THREADS="10000")[0] == str(threads.available_cpus())


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5"])
def test_nonsense_in_the_environment_is_named(value):
    code = """
import xuracore
try: xuracore.get_num_threads()
except xuracore.errors.ConfigError as error: print(error)
"""
    assert python(code, XURA_NUM_THREADS=value)[0] == f"XURA_NUM_THREADS='{value}';"


def test_a_container_s_quota_counts(tmp_path):
    assert threads._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads._cgroup_quota(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads._cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert threads._cgroup_quota(tmp_path) == 1
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert threads._cgroup_quota(tmp_path) is None


def test_idle_kernel_threads_sleep_unless_the_environment_is_ours_to_leave():
    code = "import os\nfrom xuracore import threads\nthreads.prepare_environment()\n"
    code += "print(os.environ.get('OMP_WAIT_POLICY'))"
    assert python(code) == ["passive"]
    assert python(code, OMP_WAIT_POLICY="active") == ["active"]
    assert python(code, XURA_NO_ENV="1") == ["None"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own():
    code = """
import os, sys, warnings
warnings.simplefilter("ignore")
from xuracore import threads
done = []
threads.run([(done.append, 1), (done.append, 2)])
child = os.fork()
if not child:
    threads.run([(done.append, 3), (done.append, 4)])
    os._exit(0 if sorted(done) == [1, 2, 3, 4] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == ["0"]


def test_products_do_not_depend_on_when_threads_were_set():
    """The first product of a process is split like every later one: resumed runs are equal bit by bit."""
    code = """
import hashlib, numpy as np, xuracore as xc
x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
first = hashlib.sha256(xc.ops.matmul(x, x).tobytes()).hexdigest()
xc.ops.layer_norm(x)
print(first, hashlib.sha256(xc.ops.matmul(x, x).tobytes()).hexdigest())
"""
    first, later = python(code, XURA_NUM_THREADS="1", OPENBLAS_NUM_THREADS="2", XURA_KERNELS="numpy")
    assert first == later
    x = np.random.default_rng(0).standard_normal((4, 4))
    np.testing.assert_array_equal(xc.ops.matmul(x, x), x @ x)


@pytest.mark.skipif(not threads.blas_is_controlled(), reason="this BLAS cannot be controlled")
def test_blocks_that_overlap_give_blas_its_threads_back():
    before = threads.blas_threads()
    first, second = threads.one_blas_thread(), threads.one_blas_thread()
    first.__enter__()
    second.__enter__()
    assert threads.blas_threads() == 1
    first.__exit__(None, None, None)
    assert threads.blas_threads() == 1
    second.__exit__(None, None, None)
    assert threads.blas_threads() == before
