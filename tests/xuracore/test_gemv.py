"""Stored weights: what is lost is bounded, and a product reads back exactly what is stored."""

import numpy as np
import pytest

from xuracore import Tensor, no_grad
from xuracore.errors import ConfigError, GradError, ShapeError
from xuracore.kernels import gemv as kernels
from xuracore.nn.quantized import QuantizedEmbedding, QuantizedLinear, pack

WIDTHS = ("float32", "bfloat16", "int8", "int4")


def matrix(rows, size, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, size)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)


def read_back(weight, width):
    return kernels.dequantised(*pack(weight, width))[: len(weight)]


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    below, above = np.float32(1), np.float32(1 + 2**-7)
    exact = np.array([[below, above, (below + above) / 2, 1 + 3 * 2**-8, -0.0, np.inf]], np.float32)
    assert read_back(exact, "bfloat16").tolist() == [[1, 1 + 2**-7, 1, 1 + 2**-6, -0.0, np.inf]]
    weight = matrix(5, 7)
    assert (np.abs(read_back(weight, "bfloat16") - weight) <= np.abs(weight) / 256).all()


@pytest.mark.parametrize("width, most", [("int8", 127), ("int4", 7)])
def test_an_integer_weight_is_off_by_half_a_scale_at_most(width, most):
    weight = matrix(37, 96)
    weight[3, 32:64] = 0
    weight[4, 0] = 1000
    stored, scales = pack(weight, width)
    wide = (scales.astype(np.uint32) << 16).view(np.float32)
    each = np.repeat(wide.swapaxes(1, 2).reshape(-1, 3)[:37], 32, axis=1)
    error = np.abs(read_back(weight, width) - weight)
    assert (error <= each / 2 * (1 + 1e-6)).all()
    assert (error[3, 32:64] == 0).all()
    groups = np.abs(weight).reshape(37, 3, 32).max(axis=2) / most
    assert (each[:, ::32] >= groups).all() and (each[:, ::32] <= groups * (1 + 2**-7)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows, size, batch", [(33, 64, 1), (64, 32, 3), (5, 96, 8), (70, 64, 9)])
def test_a_product_is_that_of_what_is_stored(width, rows, size, batch):
    weight, bias = matrix(rows, size), np.arange(rows, dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((batch, size)).astype(np.float32)
    layer = QuantizedLinear(weight, width, bias)
    exact = x.astype(np.float64) @ read_back(weight, width).astype(np.float64).T + bias
    bound = 1e-6 * (np.abs(x) @ np.abs(weight).T + np.abs(bias))
    assert (np.abs(layer(x) - exact) <= bound).all()
    assert layer(x.reshape(1, batch, size)).shape == (1, batch, rows)


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_of_rows_and_threads_do_not_change_a_bit(width):
    stored, scales = pack(matrix(130, 64), width)
    x, bias = matrix(2, 64, seed=2), np.zeros(130, np.float32)
    outputs = []
    for tasks, work in ((1, 0), (3, 10**9), (16, 10**9)):
        outputs.append(np.empty((2, 130), np.float32))
        kernels.gemv.sized(work)(stored, scales, bias, x, tasks, outputs[-1])
    assert np.array_equal(outputs[0], outputs[1]) and np.array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("width", WIDTHS)
def test_an_embedding_gives_rows_of_the_table_and_projects_on_them(width):
    weight = matrix(70, 64)
    table = QuantizedEmbedding(weight, width)
    ids = np.array([[0, 69, 31], [32, 16, 0]])
    assert np.array_equal(table(ids).data, read_back(weight, width)[ids])
    assert np.array_equal(table.dense(40, 66), read_back(weight, width)[40:66])
    hidden = matrix(1, 64, seed=3)
    assert np.array_equal(table.project(hidden), QuantizedLinear(weight, width)(hidden))


def test_only_buffers_are_saved_and_gradients_are_refused():
    layer = QuantizedLinear(matrix(40, 64), "int4", np.ones(40))
    assert {name: array.dtype.name for name, array in layer.state_dict().items()} == {
        "weight": "uint8", "scales": "uint16", "bias": "float32",
    }  # fmt: skip
    assert layer.weight.nbytes + layer.scales.nbytes == 64 * 64 * 4.5 / 8
    x = Tensor(matrix(1, 64)).requires_grad_()
    with pytest.raises(GradError, match="no_grad"):
        layer(x)
    with no_grad():
        assert layer(x).shape == (1, 40)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ShapeError, match="multiple of 32"):
        pack(np.ones((4, 48)), "int8")
    with pytest.raises(ConfigError, match="int4"):
        pack(np.ones((4, 32)), "int3")
    with pytest.raises(ShapeError, match="64"):
        QuantizedLinear(np.ones((4, 64)), "int8")(np.ones((1, 32), np.float32))
