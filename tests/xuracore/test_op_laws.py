"""Laws of indexing, broadcasting and linear ops, on drawn shapes and indices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xuracore as xc
from xuracore import ops
from xuracore.errors import ConfigError, DTypeError, ShapeError


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def gradient(function, x):
    """The gradient of Σ u · function(x) with a drawn u, and u."""
    leaf = xc.Tensor(x, requires_grad=True)
    y = function(leaf)
    u = drawn(y.shape, 7)
    (y * u).sum().backward()
    return (np.zeros_like(x) if leaf.grad is None else leaf.grad), u


# ---------------------------------------------------------------------- indexing is NumPy's
def check_index(x, key):
    """Values as NumPy gives them; the gradient puts each output's cotangent back where it came from."""
    got = xc.Tensor(x)[key]
    np.testing.assert_array_equal(got.data, x[key])
    found, u = gradient(lambda t: t[key], x)
    expected = np.zeros_like(x)
    np.add.at(expected, key, u)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.data())
def test_basic_indices(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    check_index(drawn(shape), data.draw(hnp.basic_indices(shape, allow_newaxis=True, max_dims=5)))


@given(st.data())
def test_integer_array_indices(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    check_index(drawn(shape), data.draw(hnp.integer_array_indices(shape)))


@given(st.data())
def test_mixed_indices(data):
    """Integers, slices, new axes, arrays of integers and of truths, in any order."""
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    size, key = data.draw(st.integers(1, 3)), []
    for n in shape:
        kind = data.draw(st.sampled_from(["integer", "slice", "array", "truths", "new axis"]))
        if kind == "new axis":
            key.append(None)
            kind = "slice"
        index = np.random.default_rng(n + len(key)).integers(-n, n, size)
        if kind == "truths":  # as many true ones as the arrays have elements
            index = np.zeros(n, bool)
            index[: min(size, n)] = True
            kind = "array" if index.sum() == size else "slice"
        key.append({"integer": -n, "slice": slice(None, None, 2), "array": index}[kind])
    check_index(drawn(shape), tuple(key[: data.draw(st.integers(1, len(key)))]))


@given(st.data())
def test_boolean_indices(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    truths = data.draw(hnp.arrays(bool, shape[: data.draw(st.integers(1, len(shape)))]))
    check_index(drawn(shape), truths)
    check_index(drawn(shape), (truths, Ellipsis))


@given(st.data())
def test_gather_and_scatter_are_transposes(data):
    """⟨gather(x), u⟩ = ⟨x, scatter(u)⟩."""
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = tuple(data.draw(st.integers(1, 4)) if i == axis % len(shape) else n for i, n in enumerate(shape))
    index = np.random.default_rng(1).integers(-shape[axis], shape[axis], size)
    x, u = drawn(shape), drawn(size, 2)
    there = ops.take_along_axis(x, index, axis=axis)
    np.testing.assert_array_equal(there, np.take_along_axis(x, index, axis))
    back = ops.scatter_add(np.zeros(shape), index, u, axis=axis)
    np.testing.assert_allclose((there * u).sum(), (x * back).sum(), atol=1e-10)


def test_taking_along_an_axis():
    x = xc.Tensor(drawn((2, 3, 4)), requires_grad=True)
    ids = np.array([[0, 2], [2, 2]])
    np.testing.assert_array_equal(ops.take(x, ids, axis=1).data, x.data[:, ids])
    np.testing.assert_array_equal(ops.take(x.data, ids, axis=1), x.data[:, ids])
    np.testing.assert_array_equal(ops.index_select(x, ids[0], axis=-1).data, x.data[..., ids[0]])
    small = np.array([[[1, 0]]])
    np.testing.assert_array_equal(ops.gather(x, small, axis=2).data, x.data[:1, :1, [1, 0]])
    assert ops.one_hot(ids, 3).tolist() == np.eye(3)[ids].tolist() and ops.one_hot(ids, 3).dtype == np.float32
    values, places = ops.topk(x, 2, axis=1, largest=False)
    np.testing.assert_array_equal(values.data, np.sort(x.data, axis=1)[:, :2])
    np.testing.assert_array_equal(np.take_along_axis(x.data, places, 1), values.data)
    np.testing.assert_array_equal(ops.median(x, axis=2).data, np.median(x.data, axis=2))
    np.testing.assert_array_equal(ops.argsort(x, descending=True), np.argsort(-x.data, kind="stable"))
    assert ops.argmax(x) == x.data.argmax() and x.argmin(axis=1).shape == (2, 4) and not (x > 9).any()
    assert ops.any(x) and not ops.all(x * 0)


# ---------------------------------------------------------------------- broadcasting
PAIRS = {"add": np.add, "multiply": np.multiply, "maximum": np.maximum, "logaddexp": np.logaddexp,
         "atan2": np.arctan2}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3))
def test_broadcasting_is_repeating(name, shapes):
    """Values are NumPy's, and the gradient of a repeated element is the sum over its repetitions."""
    (left, right), shape = shapes.input_shapes, shapes.result_shape
    a, b, op = drawn(left), drawn(right, 1), getattr(ops, name)
    found, _ = gradient(lambda t: op(t, b), np.asarray(a))
    assert found.shape == left
    repeated, _ = gradient(lambda t: op(t, b), np.array(np.broadcast_to(a, shape)))
    size = int(np.prod(left))
    places = np.broadcast_to(np.arange(size).reshape(left), shape)  # which element stands where
    by_hand = np.bincount(places.ravel(), repeated.ravel(), minlength=size).reshape(left)
    np.testing.assert_allclose(found, by_hand, atol=1e-10)
    np.testing.assert_array_equal(op(a, b), PAIRS[name](a, b))


# ---------------------------------------------------------------------- linear ops
LINEAR = {
    "reshape": ((2, 6), lambda x: ops.reshape(x, shape=(3, 4))),
    "transpose": ((2, 3, 4), lambda x: ops.transpose(x, axes=(2, 0, 1))),
    "moveaxis": ((2, 3, 4), lambda x: ops.moveaxis(x, (0, -1), (1, 0))),
    "slice": ((5, 4), lambda x: ops.getitem(x, key=(slice(4, 0, -2), slice(1, None)))),
    "pad": ((2, 3), lambda x: ops.pad(x, widths=((1, 2), (0, 1)))),
    "reflect": ((4, 3), lambda x: ops.pad(x, widths=((3, 2), (5, 1)), mode="reflect")),
    "concatenate": ((2, 3), lambda x: ops.concatenate(x, x, axis=1)),
    "chunk": ((7, 2), lambda x: ops.concatenate(*ops.chunk(x, 3, axis=0)[::-1], axis=0)),
    "unstack": ((3, 2), lambda x: ops.stack(*ops.unstack(x, axis=1), axis=0)),
    "flip": ((3, 2), lambda x: ops.flip(x, axis=0)),
    "roll": ((3, 4), lambda x: ops.roll(x, shift=(1, -2), axis=(0, 1))),
    "tile": ((2, 3), lambda x: ops.tile(x, counts=(2, 1, 2))),
    "repeat": ((2, 3), lambda x: ops.repeat(x, counts=(0, 2, 1), axis=1)),
    "tril": ((4, 3), lambda x: ops.tril(x, offset=-1)),
    "diagonal": ((3, 4), lambda x: ops.diagonal(x, offset=1)),
    "diag": ((2, 3), lambda x: ops.diag(x, offset=-1)),
    "windows": ((7, 2), lambda x: ops.windows(x, size=3, step=2, axis=0)),
    "cumsum": ((3, 4), lambda x: ops.cumsum(x, axis=0)),
    "mean": ((3, 4), lambda x: ops.mean(x, axis=0)),
    "einsum": ((3, 3), lambda x: ops.einsum(x, drawn((3, 2), 5), equation="ii,ij->j")),
    "gather": ((4, 3), lambda x: ops.take_along_axis(x, np.array([[0, 3, 0], [-1, 1, 1]]), axis=0)),
    "take": ((4, 3), lambda x: ops.take(x, np.array([[0, 2], [2, -1]]), axis=1)),
    "scatter": ((2, 3), lambda x: ops.scatter_add(np.zeros((2, 4)), np.array([[0, 0, 3], [1, 2, 1]]), x)),
    "conv1d": ((2, 2, 6), lambda x: ops.conv1d(x, drawn((4, 1, 3), 1), stride=2, padding=2, groups=2)),
    "conv2d": ((1, 2, 5, 4), lambda x: ops.conv2d(x, drawn((3, 2, 2, 3), 1), padding=1, dilation=(2, 1))),
    "conv_transpose2d": ((1, 2, 3, 2), lambda x: ops.conv_transpose2d(x, drawn((2, 3, 2, 2), 1), stride=2)),
    "unfold": ((1, 2, 4, 5), lambda x: ops.unfold(x, kernel_size=(2, 3), padding=1, stride=2)),
    "fold": ((1, 4, 9), lambda x: ops.fold(x, output_size=4, kernel_size=2)),
    "patchify": ((1, 2, 4, 6), lambda x: ops.patchify(x, (2, 3))),
    "avg_pool2d": ((1, 2, 5, 4), lambda x: ops.avg_pool2d(x, kernel_size=3, stride=2, padding=1)),
    "adaptive": ((1, 2, 5, 4), lambda x: ops.adaptive_avg_pool2d(x, output_size=(3, 3))),
    "bicubic": ((1, 2, 5, 4), lambda x: ops.interpolate(x, size=(3, 7), mode="bicubic")),
    "nearest": ((1, 2, 5), lambda x: ops.interpolate(x, size=8)),
    "rope": ((2, 3, 4), lambda x: ops.rope(x, np.array([3, 1, 4]))),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_op_and_its_gradient_are_transposes(name):
    """f(2a + b) = 2 f(a) + f(b), and ⟨f(x), u⟩ = ⟨x, fᵀ(u)⟩, in float64 to the last digits."""
    shape, op = LINEAR[name]
    a, b = drawn(shape, 2), drawn(shape, 3)
    np.testing.assert_allclose(op(2 * a + b), 2 * op(a) + op(b), atol=1e-12)
    back, u = gradient(op, a)
    np.testing.assert_allclose((op(b) * u).sum(), (b * back).sum(), rtol=1e-11, atol=1e-12)


def test_fold_counts_how_often_each_pixel_was_seen():
    settings = {"kernel_size": 3, "stride": 2, "padding": 1}
    ones = np.ones((1, 1, 5, 5))
    seen = ops.fold(ops.unfold(ones, **settings), output_size=5, **settings)
    line = np.array([1, 2, 1, 2, 1])
    np.testing.assert_array_equal(seen[0, 0], np.outer(line, line))


def test_a_rotation_keeps_lengths_and_sees_only_differences_of_positions():
    q, k = drawn((1, 8)), drawn((1, 8), 1)
    for interleaved in (False, True):
        def score(i, j, interleaved=interleaved):
            turned = (ops.rope(x, np.array([p]), interleaved=interleaved) for x, p in ((q, i), (k, j)))
            return (next(turned) * next(turned)).sum()

        np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-10)
        np.testing.assert_allclose(score(5, 5), (q * k).sum(), rtol=1e-12)


# ---------------------------------------------------------------------- dtypes
def test_no_vjp_computes_in_float64_what_came_in_float32():
    """The tape would cast the gradient back, and nobody would see what it had cost."""
    wide = set()
    for name, record in xc.ops.REGISTRY.items():
        for inputs, attributes in record.samples(np.random.default_rng(0)):
            floats = [isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in inputs]
            if "dtype" in attributes:
                continue
            given = [x.astype(np.float32) if is_float else x for x, is_float in zip(inputs, floats)]
            outputs, saved = record.forward(*given, **attributes)
            several = record.outputs > 1
            grad = [np.ones_like(y) for y in outputs] if several else np.ones_like(outputs)
            for gradient, is_float in zip(record.vjp(grad, saved, floats), floats):
                if is_float and gradient is not None and gradient.dtype != np.float32:
                    wide.add(name)
    assert not wide


# ---------------------------------------------------------------------- edges
def test_products_and_norms_of_zeros_have_the_gradients_of_their_limits():
    x = np.array([[0.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
    found = xc.grad(lambda t: ops.prod(t, axis=1).sum())(x)
    np.testing.assert_array_equal(found, [[6, 0, 0], [0, 0, 0]])
    found = xc.grad(lambda t: ops.cumprod(t, axis=1).sum())(x)
    np.testing.assert_array_equal(found, [[1 + 2 + 6, 0, 0], [1, 0, 0]])
    for order in (1.0, 2.0, 3.0, np.inf):
        assert not xc.grad(lambda t, p=order: ops.norm(t, order=p))(np.zeros(3)).any()
    assert not xc.grad(lambda t: ops.std(t))(np.ones(3)).any()


def test_nothing_yet_is_minus_infinity_in_a_running_logsumexp():
    x = xc.Tensor(np.array([-np.inf, -np.inf, 1.0, 1000.0]), requires_grad=True)
    y = ops.logcumsumexp(x)
    np.testing.assert_array_equal(y.data, [-np.inf, -np.inf, 1, 1000])
    y.sum().backward()
    np.testing.assert_allclose(x.grad, [0, 0, 1, 1])
    both = xc.grad(lambda t: ops.logaddexp(t, np.array([-np.inf, 0.0])).sum())(np.array([-np.inf, -np.inf]))
    np.testing.assert_array_equal(both, [0, 0])


def test_pooling_lets_nan_through_and_never_takes_the_padding():
    x = np.full((1, 1, 4, 4), -5.0)
    np.testing.assert_array_equal(ops.max_pool2d(x, kernel_size=3, stride=2, padding=1), -5.0)
    x[0, 0, 0, 1] = np.nan
    assert np.isnan(ops.max_pool2d(x, kernel_size=2)).ravel().tolist() == [True, False, False, False]


def test_masked_numbers_get_no_gradient():
    x = xc.tensor([1.0, np.nan, np.inf], requires_grad=True)
    y = ops.masked_fill(x, np.array([True, False, False]), 2.0)
    assert y.dtype == np.float32 and y.data[0] == 2
    ops.nan_to_num(y, nan=0.0, posinf=1.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [0, 0, 0])


def test_losses_agree_with_one_another():
    logits, target = drawn((6, 4)), np.array([0, 3, 1, -100, 2, 2])
    np.testing.assert_allclose(ops.nll_loss(ops.log_softmax(logits), target), ops.cross_entropy(logits, target))
    p, truth = ops.sigmoid(logits), (logits > 0.3).astype(float)
    np.testing.assert_allclose(ops.binary_cross_entropy(p, truth), ops.bce_with_logits(logits, truth))
    log_q, log_p = ops.log_softmax(logits), ops.log_softmax(drawn((6, 4), 1))
    assert ops.kl_div(log_q, np.exp(log_q), reduction="sum") == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(ops.kl_div(log_q, log_p, log_target=True), ops.kl_div(log_q, np.exp(log_p)))
    a, b = drawn((5, 3)), drawn((5, 3), 1)
    same = ops.cosine_embedding_loss(a, b, np.ones(5, int))
    np.testing.assert_allclose(same, ops.cosine_loss(a, b))
    apart = ops.cosine_embedding_loss(a, b, -np.ones(5, int), margin=0.1, reduction="none")
    np.testing.assert_allclose(apart, np.maximum(0, 0.9 - ops.cosine_loss(a, b, reduction="none")))
    assert ops.triplet_margin_loss(a, a, a + 3) == 0 and ops.triplet_margin_loss(a, b, b, margin=2.0) == 2
    assert xc.gradcheck(lambda *x: ops.triplet_margin_loss(*x, margin=5.0), [a, b, drawn((5, 3), 2)])


@pytest.mark.parametrize("call, error, message", [
    (lambda: ops.norm(np.ones(2), order=0), ConfigError, "order=0"),
    (lambda: ops.pad(np.ones(2), widths=((1, 1),), mode="mirror"), ConfigError, "expected one of constant"),
    (lambda: ops.interpolate(np.ones((1, 1, 2, 2)), size=3, mode="cubic"), ConfigError, "'bilinear', 'bicubic'"),
    (lambda: ops.interpolate(np.ones((1, 1, 2)), size=3, align_corners=True), ConfigError, "align_corners"),
    (lambda: ops.take(np.ones(3), np.ones(1)), DTypeError, "expected integers"),
    (lambda: ops.one_hot(np.array([3]), 3), IndexError, "id 3 is outside the 3"),
    (lambda: ops.index_add(np.ones((2, 1)), np.array([2]), np.ones((1, 1))), IndexError, "has 2 rows"),
    (lambda: ops.gather(np.ones((2, 2)), np.zeros((3, 1), int)), ShapeError, "does not fit"),
    (lambda: ops.scatter_add(np.ones((2, 2)), np.zeros((2, 1), int), np.ones((1, 1))), ShapeError, "one shape"),
    (lambda: ops.moveaxis(np.ones((2, 2)), (0, 1), 0), ShapeError, "as many places"),
    (lambda: ops.fold(np.ones((1, 5, 4)), output_size=3, kernel_size=2), ShapeError, "does not hold"),
    (lambda: ops.conv_transpose2d(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), output_padding=1), ShapeError,
     "not less than stride"),
    (lambda: ops.binary_cross_entropy(np.array([1.5]), np.array([1.0])), ConfigError, "bce_with_logits"),
    (lambda: ops.nll_loss(np.zeros((1, 2)), np.array([2])), IndexError, "outside the 2 classes"),
    (lambda: ops.triplet_margin_loss(*np.ones((3, 2, 2)), reduction="all"), ConfigError, "reduction='all'"),
    (lambda: ops.cosine_embedding_loss(*np.ones((2, 2, 2)), np.array([0, 1])), ConfigError, "1 and -1"),
    (lambda: ops.patchify(np.ones((1, 1, 5, 4)), 2), ShapeError, "do not tile"),
    (lambda: ops.diag(np.array(1.0)), ShapeError, "at least one axis"),
])  # fmt: skip
def test_nonsense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------------- the table
def test_the_table_has_a_row_for_every_op():
    from xuracore.ops.table import op_table

    rows = op_table().splitlines()
    assert len(rows) == len(xc.ops.REGISTRY) + 2 and len({row.count(" | ") for row in rows[2:]}) == 1
    keeps = {row.split(" | ")[0].strip("| `"): float(row.split(" | ")[3]) for row in rows[2:]}
    assert keeps["add"] == 0 and keeps["multiply"] == 1
