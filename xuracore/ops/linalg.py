"""Matrix products.  NumPy's BLAS does the work."""

import math

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.registry import primitive


def _matmul_forward(a, b):
    """``a @ b`` with NumPy's rules: batches broadcast, 1-d operands are vectors."""
    try:
        return np.matmul(a, b), (a, b)
    except ValueError:
        raise ShapeError(
            f"matmul of {np.shape(a)} and {np.shape(b)}: inner sizes differ or batches do not broadcast"
        ) from None


def _matmul_vjp(grad, saved, needs):
    a, b = saved
    to_a = to_b = None
    if a.ndim == 1 and b.ndim == 1:
        return grad * b, grad * a
    rows = a[None, :] if a.ndim == 1 else a
    columns = b[:, None] if b.ndim == 1 else b
    g = grad[..., None, :] if a.ndim == 1 else grad
    g = g[..., None] if b.ndim == 1 else g
    if needs[0]:
        to_a = g @ columns.swapaxes(-1, -2)
        to_a = to_a[..., 0, :] if a.ndim == 1 else to_a
    if needs[1]:
        if b.ndim == 2 and a.ndim > 2:  # one matrix for the whole batch: one product, no partial sums
            to_b = rows.reshape(-1, rows.shape[-1]).T @ g.reshape(-1, g.shape[-1])
        else:
            to_b = rows.swapaxes(-1, -2) @ g
            to_b = to_b[..., 0] if b.ndim == 1 else to_b
    return to_a, to_b


def _matmul_samples(rng):
    for a, b in (
        ((3, 4), (4, 2)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((4,), (4, 2)), ((3, 4), (4,)),
        ((4,), (4,)), ((0, 4), (4, 2)), ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((3, 4), (2, 4, 3)),
    ):
        yield (rng.standard_normal(a), rng.standard_normal(b)), {}


matmul = primitive("matmul", _matmul_forward, _matmul_vjp, reference=np.matmul, samples=_matmul_samples,
                   weak=True)


def _linear_forward(x, weight, bias=None):
    """x Wᵀ + b.  x (..., in), weight (out, in), bias (out) or None → (..., out).  Raises ShapeError."""
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"linear: x {x.shape}, weight {weight.shape}; expected (..., in) and (out, in)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"linear: bias {bias.shape}, weight {weight.shape}; expected (out,) and (out, in)")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = flat @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], len(weight)), (x, weight)


def _linear_vjp(grad, saved, needs):
    x, weight = saved
    count = math.prod(x.shape[:-1])
    flat = grad.reshape(count, grad.shape[-1])
    to_x = (flat @ weight).reshape(x.shape) if needs[0] else None
    to_weight = flat.T @ x.reshape(count, x.shape[-1]) if needs[1] else None
    to_bias = flat.sum(axis=0) if len(needs) > 2 and needs[2] else None
    return to_x, to_weight, to_bias


def _linear_samples(rng):
    yield (rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.standard_normal(5)), {}
    yield (rng.standard_normal((3, 4)), rng.standard_normal((2, 4)), None), {}
    yield (rng.standard_normal((4,)), rng.standard_normal((2, 4)), rng.standard_normal(2)), {}
    yield (rng.standard_normal((0, 4)), rng.standard_normal((2, 4)), rng.standard_normal(2)), {}


def _linear_reference(x, weight, bias=None):
    return x @ weight.T + (0 if bias is None else bias)


linear = primitive("linear", _linear_forward, _linear_vjp, reference=_linear_reference,
                   samples=_linear_samples, weak=True)


def _einsum_forward(*operands, equation):
    """Einstein summation with explicit output, e.g. ``einsum(a, b, equation="bij,bjk->bik")``.

    Each index of an operand must appear in the output or in another operand, and only once within
    one operand (no diagonals): then every gradient is again such a sum.  ShapeError otherwise.
    """
    terms, arrow, output = equation.replace(" ", "").partition("->")
    terms = terms.split(",")
    if not arrow or len(terms) != len(operands) or "." in equation:
        raise ShapeError(f"einsum {equation!r}: expected a term for each of {len(operands)} inputs, and '->'")
    for i, term in enumerate(terms):
        elsewhere = output + "".join(terms[:i] + terms[i + 1 :])
        if len(set(term)) != len(term) or any(index not in elsewhere for index in term):
            raise ShapeError(f"einsum {equation!r}: {term!r} repeats an index, or one of its is nowhere else")
    try:
        return np.einsum(equation, *operands, optimize=len(operands) > 1), (operands, terms, output)
    except ValueError as error:
        shapes = " and ".join(str(np.shape(x)) for x in operands)
        raise ShapeError(f"einsum {equation!r} of {shapes}: {error}") from None


def _einsum_vjp(grad, saved, needs):
    operands, terms, output = saved
    gradients = []
    for i, need in enumerate(needs):
        if not need:
            gradients.append(None)
            continue
        others = [terms[j] for j in range(len(terms)) if j != i]
        equation = ",".join([output, *others]) + "->" + terms[i]
        arrays = [operands[j] for j in range(len(terms)) if j != i]
        gradients.append(np.einsum(equation, grad, *arrays, optimize=True))
    return gradients


def _einsum_samples(rng):
    yield (rng.standard_normal((2, 3)), rng.standard_normal((3, 4))), {"equation": "ij,jk->ik"}
    yield (rng.standard_normal((2, 3)),), {"equation": "ij->ji"}
    three = rng.standard_normal((2, 3)), rng.standard_normal((2, 3)), rng.standard_normal(3)
    yield three, {"equation": "ij,ij,j->i"}


einsum = primitive("einsum", _einsum_forward, _einsum_vjp,
                   reference=lambda *operands, equation: np.einsum(equation, *operands),
                   samples=_einsum_samples, weak=True)
