"""Attention, embedding, linear and everyday array ops equal the published implementations' numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

import xuracore as xc
from xuracore import ops

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """A golden file, its inputs and weights as leaves; comparison at four times the reference's own error."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
            self.arrays = {key: stored[key] for key in stored.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))
        self.leaves = {
            key.partition(".")[2]: xc.Tensor(array, requires_grad=True)
            for key, array in self.arrays.items()
            if key.startswith(("in.", "w.")) and array.dtype.kind == "f"
        }

    def __getitem__(self, name):
        return self.leaves[name]

    def check(self, outputs):
        """Each output's values; then the gradients of all inputs from all outputs together."""
        for name, tensor in outputs.items():
            expected = self.arrays[f"out.{name}"]
            scale = max(1.0, float(np.max(np.abs(expected))))
            tolerance = 4 * self.meta["ref32_maxabs"][name] + 1.2e-7 * scale
            np.testing.assert_allclose(tensor.data, expected, rtol=0, atol=tolerance, err_msg=name)
        total = 0.0
        for name, tensor in outputs.items():
            if f"cot.{name}" in self.arrays:
                total = total + (tensor * self.arrays[f"cot.{name}"]).sum()
        total.backward()
        for key, expected in self.arrays.items():
            if key.startswith(("gin.", "gw.")):
                scale = max(1.0, float(np.max(np.abs(expected))))
                gradient = self[key.partition(".")[2]].grad
                np.testing.assert_allclose(gradient, expected, rtol=4e-6, atol=4e-6 * scale, err_msg=key)


def test_grouped_query_attention():
    golden = Golden("op_sdpa")
    q, k, v = golden["q"], golden["k"], golden["v"]
    golden.check({"gqa": ops.attention(q, k, v), "gqa_causal": ops.attention(q, k, v, causal=True)})


def test_multi_head_attention():
    golden = Golden("op_mha")
    heads, width = golden.meta["config"]["heads"], golden.meta["config"]["embed"]
    weight, bias = golden["in_proj_weight"], golden["in_proj_bias"]
    x, memory, ignored = golden["x"], golden["mem"], golden.arrays["in.key_padding_mask"].astype(bool)

    def project(source, part):
        rows = slice(part * width, (part + 1) * width)
        y = ops.linear(source, weight[rows], bias[rows])
        return y.reshape(*source.shape[:2], heads, width // heads).transpose(0, 2, 1, 3)

    def attend(source, **masks):
        y = ops.attention(project(x, 0), project(source, 1), project(source, 2), **masks)
        y = y.transpose(0, 2, 1, 3).reshape(*x.shape)
        return ops.linear(y, golden["out_proj.weight"], golden["out_proj.bias"])

    scores = project(x, 0) @ project(x, 1).swapaxes(-1, -2) * (width // heads) ** -0.5
    golden.check({
        "full": attend(x),
        "causal": attend(x, causal=True),
        "padded": attend(x, mask=~ignored[:, None, None, :]),
        "cross": attend(memory),
        "weights": ops.softmax(scores, axis=-1),
    })


def test_embedding_and_linear():
    golden = Golden("op_embedding_linear")
    golden.check({
        "emb": ops.embedding(golden["table"], golden.arrays["in.idx"]),
        "lin": ops.linear(golden["x"], golden["weight"], golden["bias"]),
    })


def test_everyday_ops():
    golden = Golden("op_misc")
    x, y = golden["x"], golden["y"]
    outputs = {
        "var_unbiased": ops.var(x, axis=-1, correction=1),
        "var_biased": ops.var(x, axis=-1),
        "std": ops.std(x, axis=(0, 2), correction=1),
        "prod": ops.prod(x, axis=1),
        "cumsum": ops.cumsum(x, axis=1),
        "cumprod": ops.cumprod(x * 0.5, axis=2),
        "max": x.max(axis=-1),
        "min": x.min(axis=(0, 1)),
        "norm2": ops.norm(x, axis=-1),
        "logaddexp": ops.logaddexp(x, y),
        "where": ops.where(x > y, x * y, x - y),
        "pow": ops.absolute(x) ** 1.7,
        "clamp": ops.clip(x, low=-0.5, high=0.8),
        "einsum": ops.einsum(x, ops.broadcast_to(y, shape=x.shape), equation="bij,bkj->bik"),
        "flip": ops.flip(x, axis=1),
        "roll": ops.roll(x, shift=2, axis=1),
        "sorted": ops.sort(x),
        "topk": ops.topk(x, 2)[0],
        "tril": ops.tril(x),
        "pad": ops.pad(x, widths=((0, 0), (0, 1), (1, 2))),
        "unfold": ops.windows(x, size=2, axis=1),
        "repeat_interleave": ops.repeat(x, counts=2, axis=1),
        "maxpool": ops.max_pool1d(x, 2),
        "avgpool": ops.avg_pool1d(x, 3, 1),
    }
    assert {f"out.{name}" for name in outputs} == {key for key in golden.arrays if key.startswith("out.")}
    golden.check(outputs)


@pytest.mark.parametrize("shape", [(4, 6), (1, 1, 3, 3, 3)])
def test_attention_needs_four_axes(shape):
    with pytest.raises(xc.errors.ShapeError, match="four axes"):
        ops.attention(*[np.ones(shape, np.float32)] * 3)


def test_attention_refuses_a_mask_of_integers():
    """Ones and zeros may mean seen and hidden, or the opposite, or be meant to be added."""
    q = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(xc.errors.DTypeError, match="expected bool"):
        ops.attention(q, q, q, mask=np.zeros((2, 2), int))


def test_where_nothing_may_be_seen_attention_gives_zeros_and_finite_gradients():
    q = xc.Tensor(np.ones((1, 1, 2, 2), np.float32), requires_grad=True)
    y = ops.attention(q, q, q, mask=np.array([[True, False], [False, False]]))
    np.testing.assert_array_equal(y.data[0, 0, 1], [0, 0])
    y.sum().backward()
    assert np.isfinite(q.grad).all()


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: ops.matmul(x, x), r"matmul of \(2, 3\) and \(2, 3\)"),
        (lambda x: ops.matmul(x, 3.0), r"matmul of \(2, 3\) and \(\)"),
        (lambda x: ops.linear(x, np.ones((4, 2))), r"linear: x \(2, 3\), weight \(4, 2\)"),
        (lambda x: ops.linear(x, np.ones((4, 3)), np.ones(3)), r"bias \(3,\), weight \(4, 3\)"),
        (lambda x: x.reshape(4, -1), r"cannot reshape \(2, 3\) \(6 elements\) to \(4, -1\)"),
        (lambda x: x.transpose(0, 0), r"axes \(0, 0\) are no permutation"),
        (lambda x: ops.broadcast_to(x, shape=(3, 3)), r"cannot broadcast \(2, 3\) to \(3, 3\)"),
        (lambda x: ops.split(x, (1, 1)), r"add up to 2; axis 1 has 3"),
        (lambda x: ops.cumsum(x, axis=None), "along one axis"),
        (lambda x: ops.einsum(x, equation="ij->jj"), "an index of 'jj' repeats"),
        (lambda x: ops.einsum(x, equation="ij->k"), "or is in no input"),
        (lambda x: ops.einsum(x, equation="ii->i"), r"einsum .* of \(2, 3\)"),
        (lambda x: ops.einsum(x, equation="ijk->i"), r"'ijk' does not fit an array of shape \(2, 3\)"),
        (lambda x: ops.einsum(x, equation="...j->j"), "missing from the output"),
        (lambda x: ops.einsum(x, equation="i1"), "expected letters"),
        (lambda x: ops.squeeze(x, 0), r"axis 0 of shape \(2, 3\) has not size 1"),
        (lambda x: ops.flatten(x, 1, 0), "from left to right"),
        (lambda x: ops.topk(x, 4), "topk of 4 along axis -1"),
        (lambda x: ops.outer(x, x), "expected two vectors"),
        (lambda x: ops.windows(x, size=4), "none fits"),
        (lambda x: ops.take_along_axis(x, np.array([0])), "expected as many axes"),
        (lambda x: ops.conv1d(x, x), r"expected \(B, C, L\)"),
        (lambda x: ops.conv2d(x[None, None], np.ones((1, 1, 3, 3))), "fits every"),
        (lambda x: ops.conv2d(x[None, None], np.ones((1, 2, 1, 1))), "expected x"),
        (lambda x: ops.max_pool2d(x[None, None], 2, padding=2), "more than half"),
        (lambda x: ops.group_norm(x, groups=2), "divisible by 2 groups"),
        (lambda x: ops.interpolate(x, size=2), "sizes from 1"),
        (lambda x: ops.rope(x, np.arange(2)), "D even"),
        (lambda x: ops.einsum(x, x, equation="ij->ij"), "a term for each of 2 inputs"),
        (lambda x: ops.einsum(x, x, equation="ij,jk->ik"), r"of \(2, 3\) and \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(xc.errors.ShapeError, match=message):
        call(xc.tensor(np.ones((2, 3), np.float32), requires_grad=True))


def test_ids_are_integers_inside_the_table():
    table = np.ones((4, 2), np.float32)
    with pytest.raises(xc.errors.DTypeError, match="ids are float64"):
        ops.embedding(table, np.ones(3))
    with pytest.raises(IndexError, match="id 4 is outside the table of 4 rows"):
        ops.embedding(table, np.array([0, 4]))
    with pytest.raises(IndexError, match="id -1"):
        ops.embedding(table, np.array([0, -1]))
