"""Matrix products.  NumPy's BLAS does the work."""

import functools
import math
import string

import numpy as np

from xuracore.errors import ShapeError
from xuracore.ops.elementwise import multiply
from xuracore.ops.registry import primitive
from xuracore.ops.shape import expand_dims


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


# ---------------------------------------------------------------------- einsum
def _einsum_terms(equation, shapes):
    """(terms, output) of an equation with every index spelt out.  Raises ShapeError.

    An ellipsis becomes capital letters that the equation does not use, the last axis the same in all
    terms; an output left out is the sorted indices that occur once, after the ellipsis.
    """
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise ShapeError(f"einsum {equation!r}: expected a term for each of {len(shapes)} inputs")
    named = [term.replace("...", "", 1) for term in (*terms, output)]
    if not all(term.isascii() and (term.isalpha() or not term) for term in named):
        raise ShapeError(f"einsum {equation!r}: expected letters, commas, '...' once in a term, and '->'")
    free = [letter for letter in reversed(string.ascii_letters) if letter not in equation]
    widest = 0
    for i, (term, letters, shape) in enumerate(zip(terms, named, shapes)):
        more = len(shape) - len(letters)
        if more < 0 or more and "..." not in term or more > len(free):
            raise ShapeError(f"einsum {equation!r}: {term!r} does not fit an array of shape {shape}")
        terms[i] = term.replace("...", "".join(free[:more][::-1]))
        widest = max(widest, more)
    every = "".join(free[:widest][::-1])
    if not arrow:
        output = every + "".join(sorted(c for c in set("".join(named)) if left.count(c) == 1))
    elif widest and "..." not in output:
        raise ShapeError(f"einsum {equation!r}: the axes of '...' are missing from the output {output!r}")
    output = output.replace("...", every)
    if len(set(output)) != len(output) or set(output) - set("".join(terms)):
        raise ShapeError(f"einsum {equation!r}: an index of {output!r} repeats, or is in no input")
    return terms, output


@functools.lru_cache(maxsize=512)
def _einsum_path(equation, shapes):
    """The order of the products, found once for an equation and its shapes."""
    return np.einsum_path(equation, *(np.broadcast_to(np.float32(0), shape) for shape in shapes))[0]


def _einsum(terms, output, arrays):
    equation = ",".join(terms) + "->" + output
    if len(arrays) == 1:
        return np.einsum(equation, *arrays)
    return np.einsum(equation, *arrays, optimize=_einsum_path(equation, tuple(x.shape for x in arrays)))


def _einsum_forward(*operands, equation):
    """Einstein summation as in NumPy, e.g. ``einsum(a, b, equation="bij,bjk->bik")``.

    Indices may repeat within a term (the diagonal), be summed away, and be left to '...' (which
    broadcasts); without '->' the output has the indices that occur once, sorted.  Raises ShapeError.
    """
    terms, output = _einsum_terms(equation, [x.shape for x in operands])
    try:
        return np.array(_einsum(terms, output, operands)), (operands, terms, output)
    except ValueError as error:
        shapes = " and ".join(str(np.shape(x)) for x in operands)
        raise ShapeError(f"einsum {equation!r} of {shapes}: {error}") from None


def _einsum_vjp(grad, saved, needs):
    operands, terms, output = saved
    return [
        _einsum_gradient(grad, i, operands, terms, output) if need else None for i, need in enumerate(needs)
    ]


def _einsum_gradient(grad, i, operands, terms, output):
    """The same sum with the output's gradient in place of operand ``i``, whose indices are the result."""
    others = [j for j in range(len(terms)) if j != i]
    elsewhere = output + "".join(terms[j] for j in others)
    indices = "".join(dict.fromkeys(terms[i]))
    found = "".join(c for c in indices if c in elsewhere)
    part = _einsum([output, *(terms[j] for j in others)], found, [grad, *(operands[j] for j in others)])
    if indices == found == terms[i]:
        return part
    # Summed away alone: each element gets the same.  Repeated: only the diagonal gets anything.
    out = np.zeros(operands[i].shape, grad.dtype)
    diagonal = np.einsum(f"{terms[i]}->{indices}", out)  # a writable view
    part = part.reshape([part.shape[found.index(c)] if c in found else 1 for c in indices])
    axes = tuple(k for k, (n, m) in enumerate(zip(diagonal.shape, part.shape)) if n == 1 < m)
    diagonal[...] = part.sum(axis=axes, keepdims=True)
    return out


def _einsum_samples(rng):
    for equation, *shapes in (
        ("ij,jk->ik", (2, 3), (3, 4)), ("ij->ji", (2, 3)), ("ij,ij,j->i", (2, 3), (2, 3), (3,)),
        ("...i,ij->...j", (2, 1, 3), (3, 2)), ("...ij,...jk", (2, 2, 3), (3, 2)), ("ij,...j->...i", (2, 3), (4, 1, 3)),
        ("ii->i", (3, 3)), ("iij,j", (2, 2, 3), (3,)), ("ij->", (2, 3)), ("ij,kl->il", (2, 3), (2, 3)),
        ("ij,ij->ij", (1, 3), (2, 3)), ("i,j", (2,), (0,)), (",i->i", (), (3,)), ("bii,b->b", (1, 2, 2), (3,)),
    ):  # fmt: skip
        yield tuple(np.asarray(rng.standard_normal(shape)) for shape in shapes), {"equation": equation}


einsum = primitive("einsum", _einsum_forward, _einsum_vjp,
                   reference=lambda *operands, equation: np.einsum(equation, *operands),
                   samples=_einsum_samples, weak=True)


# ---------------------------------------------------------------------- vectors
def dot(a, b):
    """Σ a b of two vectors of one length.  ShapeError for anything else (see :func:`matmul`)."""
    if len(np.shape(a)) != 1 or np.shape(a) != np.shape(b):
        raise ShapeError(f"dot of {np.shape(a)} and {np.shape(b)}; expected two vectors of one length")
    return matmul(a, b)


def outer(a, b):
    """The matrix of all products a[i] b[j] of two vectors.  Raises ShapeError."""
    if len(np.shape(a)) != 1 or len(np.shape(b)) != 1:
        raise ShapeError(f"outer of {np.shape(a)} and {np.shape(b)}; expected two vectors")
    return multiply(expand_dims(a, 1), b)
