"""What Numba makes of the kernels: few builds, float32 arithmetic in vector registers, no stray double."""

import re

import numpy as np
import pytest

import xuracore as xc
from xuracore import jit, warmup
from xuracore.errors import ConfigError, DTypeError, ShapeError
from xuracore.jit import kernel, prange

needs_numba = pytest.mark.skipif(jit.backend() != "numba", reason="kernels are not compiled here")

# Kernels that calculate in float64 on purpose: sums over a whole array, and scalars set up once a call.
IN_DOUBLE = {"cross_entropy_forward", "cross_entropy_backward", "sum_of_squares", "adamw_update"}
ALSO_SCALARS = re.compile(r"norm|ssd_chunk|linear_state|vandermonde")

PACKED = [  # kernels whose loops must be vector code, and a vector instruction that shows it
    "sigmoid_forward", "silu_forward", "silu_backward", "softplus_forward", "gelu_forward", "gelu_backward",
    "gelu_tanh_forward", "layer_norm_forward", "layer_norm_backward", "rms_norm_forward", "softmax_forward",
    "softmax_backward", "causal_conv_forward", "adamw_update",
]  # fmt: skip


def _double_numpy(x, out):
    out[...] = 2 * x


@kernel(twin=_double_numpy, parallel=True)
def double(x, out):
    two = x.dtype.type(2)
    for i in prange(x.size):
        out[i] = two * x[i]


@kernel(twin=_double_numpy, parallel=True)
def two_loops(x, out):
    for i in prange(x.size):
        out[i] = x[i]
    for i in prange(x.size):
        out[i] += x[i]


@kernel(twin=_double_numpy, parallel=True)
def writes_before(x, out):
    out[:] = x
    for i in prange(x.size):
        out[i] += x[i]


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_the_parts_of_a_loop_cover_it(parts, size):
    x, out = np.arange(size, dtype=np.float32), np.full(size, np.nan, np.float32)
    double.in_parts(parts)(x, out)
    np.testing.assert_array_equal(out, 2 * x)


@needs_numba
@pytest.mark.parametrize("each", [two_loops, writes_before], ids=lambda each: each.__name__)
def test_a_parallel_kernel_must_end_in_its_one_loop(each):
    with pytest.raises(ConfigError, match="needs one prange loop"):
        each(np.ones(3), np.ones(3))


@needs_numba
def test_a_layout_that_would_cost_another_build_is_refused():
    x, out = np.arange(6, dtype=np.float32), np.empty(6, np.float32)
    double(x, out)
    with pytest.raises(ShapeError, match="kernel double: x has strides; give a C-contiguous array"):
        double(x[::2], out[:3])
    x.flags.writeable = False
    with pytest.raises(DTypeError, match="kernel double: x is read-only"):
        double(x, out)
    assert len(double.compiled().signatures) == 1


@needs_numba
@pytest.mark.parametrize("name", ["silu", "softmax", "layer_norm", "causal_conv1d", "embedding"])
def test_ops_take_read_only_arrays(name):
    record = xc.ops.REGISTRY[name]
    for inputs, attributes in record.samples(np.random.default_rng(0)):
        inputs = [x.copy() if isinstance(x, np.ndarray) else x for x in inputs]
        for x in inputs:
            if isinstance(x, np.ndarray):
                x.flags.writeable = False
        output, saved = record.forward(*inputs, **attributes)
        first = output[0] if record.outputs > 1 else output
        grad = np.broadcast_to(np.ones((), first.dtype), first.shape)  # read-only, and strided
        if record.outputs == 1:
            record.vjp(grad, saved, [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs])


@needs_numba
def test_a_call_costs_what_the_dispatcher_costs():
    """The function handed out is Numba's own dispatcher, with the number of the part filled in: all of it is C."""
    call = double.sized(10)
    assert call.func is double.compiled() and call.args == (0, 1)
    assert double.sized(10) is call


def ours():
    warmup.load_kernels()
    return {each.__name__: each for each in jit.KERNELS if each.__module__.startswith("xuracore.kernels.")}


def signatures_in_single(each):
    """Signatures whose arrays of floats are float32; a kernel that has none was not called yet."""
    found = []
    for signature in each.compiled().signatures if each._compiled else ():
        dtypes = {str(kind.dtype) for kind in signature if hasattr(kind, "dtype")}
        if "float32" in dtypes:
            found.append(signature)
    return found


@needs_numba
@pytest.mark.slow
def test_loops_in_single_precision_are_vector_code(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # a build read from a cache cannot be looked at
    warmup.warm_up()
    if not re.search(r"avx2|avx512f", _features()):
        pytest.skip("the table was made for AVX2 and wider")
    for name in PACKED:
        code = _assembly(ours()[name])
        if code is not None:
            assert re.search(r"v\w+ps\s.*%[yz]mm", code), f"{name} has no packed instruction"
            assert not re.search(r"\b(expf|logf|rintf|tanhf|erff)\b", code), f"{name} calls the C library"


@needs_numba
@pytest.mark.slow
def test_single_precision_stays_single():
    warmup.warm_up()
    for name, each in ours().items():
        code = None if name in IN_DOUBLE or ALSO_SCALARS.search(name) else _assembly(each)
        if code is not None:
            assert not re.search(r"v(add|mul|fmadd\d+|div|sub)(sd|pd)\s", code), f"{name} calculates in double"


def _features():
    import subprocess
    import sys

    code = "import llvmlite.binding as b; print(b.get_host_cpu_features().flatten())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout


def _assembly(each):
    """Assembly of the float32 build, compiled anew where it came from the cache."""
    for signature in signatures_in_single(each):
        return jit.assembly(each, signature)


@pytest.mark.skipif(jit.backend() != "python", reason="for NUMBA_DISABLE_JIT=1")
def test_every_kernel_runs_as_plain_python():
    names = set(ours())
    warmup.warm_up()
    assert names - {name for name, how, _ in jit.FIRST_CALLS if how == "python"} == set()


@needs_numba
def test_no_kernel_has_more_than_two_builds():
    """Sorted to the end of the suite: each kernel was built for float32 and float64 at most."""
    kernels = ours().values()
    builds = {each.__name__: each.compiled().signatures for each in kernels if each._compiled is not None}
    # One more for each way the weights are stored: bfloat16, int8, int4; here also mixed within a layer.
    allowed = dict.fromkeys(["gemv", "project", "mamba1_project", "mamba1_scan", "mamba2_project", "residual"], 6)
    assert {name: found for name, found in builds.items() if len(found) > allowed.get(name, 2)} == {}
