"""Kernels compile with less of Numba; what is left out is back afterwards, and for everybody else."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from xuracore import compiling, jit
from xuracore.jit import device, kernel

needs_numba = pytest.mark.skipif(jit.backend() != "numba", reason="needs Numba")


@device
def squared(x):
    return x * x


def sum_of_squares_numpy(x, out):
    out[0] = np.sum(x * x)


@pytest.fixture
def fresh():
    @kernel(twin=sum_of_squares_numpy)
    def sum_of_squares(x, out):
        total = x.dtype.type(0)
        for i in range(x.size):
            total += squared(x[i])
        out[0] = total

    yield sum_of_squares
    jit.KERNELS.remove(sum_of_squares)


def run(each):
    out = np.zeros(1, np.float32)
    each(np.arange(4, dtype=np.float32), out)
    assert out[0] == 14


@needs_numba
def test_numba_is_as_it_was_once_a_kernel_is_compiled(fresh):
    from numba.core import types

    kinds = types.functions.BaseFunction, types.BoundFunction
    before = [kind.get_call_type for kind in kinds]
    run(fresh)
    context = fresh.compiled().targetctx
    assert [kind.get_call_type for kind in kinds] == before
    assert "load_additional_registries" not in vars(context) and "_library_class" not in vars(context.codegen())


@needs_numba
def test_only_what_is_called_from_outside_becomes_machine_code(fresh):
    from numba.core import registry

    context = registry.cpu_target.target_context
    with compiling.lighter(jit._numba(), context):
        dispatcher = jit._njit(jit._OPTIONS)(jit._with_compiled_globals(fresh.one_part()))
        run(dispatcher)
    (build,) = dispatcher.overloads.values()
    (inner,) = [build.library for build in squared.compiled().overloads.values()]
    assert build.library._emitted and not inner._emitted


@pytest.mark.parametrize("version", ["0.61.2", "0.68.0", "0.69.0rc1", "1.0"])
def test_another_numba_compiles_as_it_does_by_itself(version):
    usual = type("Compiler", (), {})
    other = ModuleType("numba")
    other.__version__ = version  # too old, different inside, too new
    other.core = SimpleNamespace(compiler=SimpleNamespace(Compiler=usual))
    assert not compiling.supported(other) and compiling.compiler(other) is usual
    with compiling.lighter(other, None):
        pass


WORKER = """
import json
from xuracore import jit, warmup
warmup.load_kernels()
worker = warmup._forked()
worker.stdin.write("unpack\\n")
worker.stdin.flush()
print(worker.stdout.readline().strip())
worker.stdin.close()
print(json.dumps(worker.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_answers_each_unit_and_ends_when_there_are_no_more():
    lines = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=120).stdout
    assert list(map(json.loads, lines.splitlines())) == [[], 0]
