"""Every dense kernel does what its NumPy twin does, in both dtypes, serial and parallel."""

import numpy as np
import pytest

from xuracore import jit
from xuracore.kernels import activation, attention, conv, cross_entropy, norm, optimizer, scatter, softmax

if jit.backend() == "numpy":
    pytest.skip("the kernels are the twins here", allow_module_level=True)


def elementwise(inputs):
    def arguments(rng, size, dtype):
        arrays = [(4 * rng.standard_normal(size)).astype(dtype) for _ in range(inputs)]
        return (*arrays, np.empty(size, dtype))

    return arguments


def layer_norm_arguments(rng, size, dtype):
    x, weight, bias = rows(rng, size, dtype), rng.standard_normal(7).astype(dtype), np.ones(7, dtype)
    return x, weight, bias, 1e-5, np.empty_like(x), np.empty(size, dtype), np.empty(size, dtype)


def layer_norm_backward_arguments(rng, size, dtype):
    *_, y, mean, rstd = forward = layer_norm_arguments(rng, size, dtype)
    norm.layer_norm_forward_numpy(*forward)
    sums = [np.empty((norm.row_blocks(size), 7), dtype) for _ in range(2)]
    return rows(rng, size, dtype), forward[0], forward[1], mean, rstd, y, *sums


def rms_norm_arguments(rng, size, dtype):
    x = rng.standard_normal((size, 2, 3)).astype(dtype)
    return x, rng.standard_normal((2, 3)).astype(dtype), 1e-6, np.empty_like(x), np.empty((size, 2), dtype)


def rms_norm_backward_arguments(rng, size, dtype):
    x, weight, _, y, rstd = forward = rms_norm_arguments(rng, size, dtype)
    norm.rms_norm_forward_numpy(*forward)
    partial = np.empty((norm.row_blocks(size), 2, 3), dtype)
    return rng.standard_normal(x.shape).astype(dtype), x, weight, rstd, y, partial


def gated_rms_norm_arguments(norm_first):
    def arguments_for(rng, size, dtype):
        x, weight, eps, y, rstd = rms_norm_arguments(rng, size, dtype)
        z = rng.standard_normal(x.shape).astype(dtype)
        return x, z, weight, eps, norm_first, y, rstd

    return arguments_for


def gated_rms_norm_backward_arguments(norm_first):
    def arguments_for(rng, size, dtype):
        x, z, weight, _, _, y, rstd = forward = gated_rms_norm_arguments(norm_first)(rng, size, dtype)
        norm.gated_rms_norm_forward_numpy(*forward)
        partial = np.empty((norm.row_blocks(size), 2, 3), dtype)
        grad = rng.standard_normal(x.shape).astype(dtype)
        return grad, x, z, weight, norm_first, rstd, y, np.empty_like(x), partial

    return arguments_for


def conv_arguments(rng, size, dtype):
    x, state, taps = (rng.standard_normal(s).astype(dtype) for s in [(2, size, 140), (2, 3, 140), (4, 140)])
    return x, state, taps, np.ones(140, dtype), np.empty_like(x)


def conv_backward_arguments(rng, size, dtype):
    x, state, taps, bias, y = conv_arguments(rng, size, dtype)
    return x[::-1].copy(), x, state, taps, y, *(np.empty_like(a) for a in (state, taps, bias))


def softmax_arguments(rng, size, dtype):
    x = 30 * rows(rng, size, dtype)
    x[0, 0] = -np.inf
    return x, np.empty_like(x)


def softmax_backward_arguments(rng, size, dtype):
    forward = softmax_arguments(rng, size, dtype)
    softmax.softmax_forward_numpy(*forward)
    return rows(rng, size, dtype), forward[1], np.empty_like(forward[1])


def log_softmax_backward_arguments(rng, size, dtype):
    forward = softmax_arguments(rng, size, dtype)
    softmax.log_softmax_forward_numpy(*forward)
    return rows(rng, size, dtype), forward[1], np.empty_like(forward[1])


def cross_entropy_arguments(rng, size, dtype):
    x, target = rows(rng, size, dtype), rng.integers(0, 7, size)
    target[0] = -100
    return x, target, np.empty(size, dtype), -100, 0.1, np.empty(size), np.empty(size)


def cross_entropy_backward_arguments(rng, size, dtype):
    x, target, maximum, *_, log_sum = forward = cross_entropy_arguments(rng, size, dtype)
    cross_entropy.cross_entropy_forward_numpy(*forward)
    return x[:, 0].astype(np.float64), x, target, maximum, log_sum, -100, 0.1, np.empty_like(x)


def total_loss_arguments(rng, size, dtype):
    target = rng.integers(0, 9, size)  # of 7 classes
    target[0] = -100
    return rng.standard_normal(size), target, -100, 7, np.empty(3)


def attention_arguments(rng, size, dtype):
    scores = 3 * rng.standard_normal((4 * size, 9)).astype(dtype)
    scores[0, 0] = scores[1] = -np.inf
    top = np.where(rng.random(4 * size) < 0.5, -np.inf, 1.0).astype(dtype)
    return scores, size, 3, top, (top == 1).astype(dtype), np.empty_like(top)


def attention_gradient_arguments(rng, size, dtype):
    scores, slope = 3 * rng.standard_normal((2, 4 * size, 9)).astype(dtype)
    log_sum = np.where(rng.random(4 * size) < 0.2, np.inf, 9.0).astype(dtype)
    return scores, slope, size, -1, log_sum, rng.standard_normal(4 * size).astype(dtype)


def adamw_arguments(rng, size, dtype):
    parameter, grad, mean = rng.standard_normal((3, size)).astype(dtype)
    return parameter, grad, mean, grad * grad, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.19, 0.0199


def sum_of_squares_arguments(rng, size, dtype):
    return rng.standard_normal(size).astype(dtype), np.empty(1)


def scatter_arguments(rng, size, dtype):
    return rng.integers(0, 5, size), rows(rng, size, dtype), np.ones((5, 7), dtype)


def rows(rng, size, dtype):
    return rng.standard_normal((size, 7)).astype(dtype)


CASES = [
    (activation.sigmoid_forward, elementwise(1)),
    (activation.softplus_forward, elementwise(1)),
    (activation.softplus_backward, elementwise(2)),
    (activation.silu_forward, elementwise(1)),
    (activation.silu_backward, elementwise(2)),
    (activation.erf_forward, elementwise(1)),
    (activation.gelu_forward, elementwise(1)),
    (activation.gelu_backward, elementwise(2)),
    (activation.gelu_tanh_forward, elementwise(1)),
    (activation.gelu_tanh_backward, elementwise(2)),
    (norm.layer_norm_forward, layer_norm_arguments),
    (norm.layer_norm_backward, layer_norm_backward_arguments),
    (norm.rms_norm_forward, rms_norm_arguments),
    (norm.rms_norm_backward, rms_norm_backward_arguments),
    (norm.gated_rms_norm_forward, gated_rms_norm_arguments(True)),
    (norm.gated_rms_norm_backward, gated_rms_norm_backward_arguments(True)),
    (norm.gated_rms_norm_forward, gated_rms_norm_arguments(False)),
    (norm.gated_rms_norm_backward, gated_rms_norm_backward_arguments(False)),
    (conv.causal_conv_forward, conv_arguments),
    (conv.causal_conv_backward, conv_backward_arguments),
    (softmax.softmax_forward, softmax_arguments),
    (softmax.softmax_backward, softmax_backward_arguments),
    (softmax.log_softmax_forward, softmax_arguments),
    (softmax.log_softmax_backward, log_softmax_backward_arguments),
    (cross_entropy.cross_entropy_forward, cross_entropy_arguments),
    (cross_entropy.cross_entropy_backward, cross_entropy_backward_arguments),
    (cross_entropy.total_loss, total_loss_arguments),
    (attention.attention_weights, attention_arguments),
    (attention.attention_gradient, attention_gradient_arguments),
    (optimizer.adamw_update, adamw_arguments),
    (optimizer.sum_of_squares, sum_of_squares_arguments),
    (scatter.scatter_add_rows, scatter_arguments),
]

NAMES = [kernel.__name__ for kernel, _ in CASES]
ELEMENTWISE = [(kernel, inputs) for kernel, inputs in CASES if kernel.__name__.split("_")[0] in
               ("sigmoid", "softplus", "silu", "erf", "gelu")]

BUILDS = [(np.float32, False), (np.float64, False), (np.float32, True)]


@pytest.mark.parametrize("build", BUILDS, ids=["float32", "float64", "parallel"])
@pytest.mark.parametrize("kernel, arguments", CASES, ids=NAMES)
def test_kernel_equals_twin(kernel, arguments, build):
    dtype, parallel = build
    if parallel and not kernel.parallel:
        pytest.skip("this kernel runs on one thread")
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    for size in (1, 3, 200):
        expected = arguments(np.random.default_rng(size), size, dtype)
        found = arguments(np.random.default_rng(size), size, dtype)
        with np.errstate(invalid="ignore"):
            kernel.twin(*expected)
        kernel.in_parts(3 if parallel else 1)(*found)
        for want, got in zip(expected, found):
            if isinstance(want, np.ndarray):
                assert got.dtype == want.dtype
                np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("kernel, arguments", CASES, ids=NAMES)
def test_number_of_threads_changes_no_bit(kernel, arguments):
    if not kernel.parallel:
        pytest.skip("this kernel runs on one thread")
    results = []
    for parts in (1, 2, 3, 7):
        results.append(arguments(np.random.default_rng(0), 333, np.float32))
        kernel.in_parts(parts)(*results[-1])
    for one, *others in zip(*results):
        if isinstance(one, np.ndarray):
            for other in others:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kernel, inputs", ELEMENTWISE, ids=[kernel.__name__ for kernel, _ in ELEMENTWISE])
def test_not_a_number_stays_visible(kernel, inputs):
    arguments = inputs(np.random.default_rng(0), 9, np.float32)
    for array in arguments[:-1]:
        array[4] = np.nan
    kernel(*arguments)
    assert np.isnan(arguments[-1][4]) and np.isfinite(np.delete(arguments[-1], 4)).all()


def test_softmax_gives_masked_scores_no_weight():
    x = np.array([[0.0, -np.inf, 1.0]], np.float32)
    y = np.empty_like(x)
    softmax.softmax_forward(x, y)
    assert y[0, 1] == 0 and abs(y.sum() - 1) < 1e-6
