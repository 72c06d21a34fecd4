"""``python -m xuracore``: what it finds, and that warming up leaves no kernel cold."""

import os
import subprocess
import sys

import numpy as np
import pytest

from xuracore import jit, warmup
from xuracore.doctor import examine

needs_numba = pytest.mark.skipif(jit.backend() != "numba", reason="kernels run as NumPy here")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "xuracore", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def test_doctor_prints_what_it_finds_and_what_could_be_better():
    result = run("doctor", XURA_KERNELS="numpy", XURA_NUM_THREADS="1")
    assert result.returncode == 0 and result.stderr == ""
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert f"numpy {np.__version__}" in lines["packages"]
    assert lines["threads"].startswith("1 (XURA_NUM_THREADS=1)")
    assert lines["note"].startswith("XURA_KERNELS=numpy")


@needs_numba
def test_doctor_finds_the_kernels_and_where_they_are_kept(tmp_path):
    result = run("doctor", NUMBA_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"kernel cache    {tmp_path}" in result.stdout
    assert "compiled by Numba" in result.stdout


@needs_numba
def test_doctor_notes_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(jit, "cache_directory", lambda: "/proc/nowhere")
    assert any("NUMBA_CACHE_DIR" in note for note in examine()[1])


@pytest.mark.parametrize("setting", [{"XURA_KERNELS": "fortran"}, {"XURA_NUM_THREADS": "many"}])
def test_a_wrong_setting_is_one_clear_line(setting):
    result = run("doctor", **setting)
    assert result.returncode == 2
    assert result.stderr.startswith("error: " + next(iter(setting))) and result.stderr.count("\n") == 1


def test_warm_up_has_nothing_to_do_without_compiled_kernels():
    result = run("warmup", XURA_KERNELS="numpy")
    assert result.returncode == 0 and "nothing to compile" in result.stdout


def test_warm_up_reaches_every_kernel(monkeypatch):
    """With inputs in float32; what calculates in float64 even so, does so for every caller."""
    warmup.load_kernels()
    ours = {kernel.__name__ for kernel in jit.KERNELS if kernel.__module__.startswith("xuracore.kernels.")}
    reached = set()

    def twin_of(kernel):
        def call(*arguments):
            if any(isinstance(a, np.ndarray) and a.dtype.kind == "f" for a in arguments):
                reached.add(kernel.__name__)
            return kernel.twin(*arguments)

        return call

    monkeypatch.setattr(jit.Kernel, "__call__", lambda kernel, *arguments: twin_of(kernel)(*arguments))
    monkeypatch.setattr(jit.Kernel, "sized", lambda kernel, work: twin_of(kernel))
    monkeypatch.setattr(jit.Kernel, "split", lambda kernel, tasks, work: twin_of(kernel))
    warmup._run_samples()
    assert ours - reached == set(), "an op sample, or an entry in xuracore.warmup.SAMPLES, is missing"


def test_workers_do_each_unit_once_and_what_a_dead_one_leaves_is_done_here(monkeypatch):
    done, noted = [], []
    monkeypatch.setattr(warmup, "_run", lambda unit: done.append(unit) or [(unit, "compiled", 0.0)])
    units = ["sum_of_squares"] * 3
    monkeypatch.setattr(sys, "executable", "/bin/false")
    warmup._with_workers(units, 2, noted.append)
    assert units == [] and len(noted) == len(done) and set(noted) <= {("sum_of_squares", "compiled", 0.0)}


def test_a_worker_answers_each_name_with_a_line_of_json():
    code = "from xuracore import warmup; warmup._work()"
    result = subprocess.run([sys.executable, "-c", code], input="cumulate\nreduce\n", capture_output=True,
                            text=True, timeout=300, env=os.environ | {"XURA_KERNELS": "numpy"})  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n[]\n", "")


@needs_numba
@pytest.mark.slow
def test_a_second_warm_up_reads_the_cache(tmp_path):
    def milliseconds():
        result = run("warmup", NUMBA_CACHE_DIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        *builds, total = [line.split() for line in result.stdout.splitlines()]
        assert {build[2] for build in builds} >= set(warmup.load_kernels())
        return float(total[0])

    assert milliseconds() > 3 * milliseconds()
