"""Normalisation over an axis: layer norm, RMS norm (plain and gated), L2, softmax and its logarithm.

The mathematics stands in :mod:`xuracore.kernels.norm` and :mod:`xuracore.kernels.softmax`.
"""

import math

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels import norm as kernels
from xuracore.kernels import softmax as softmax_kernels
from xuracore.ops.arrays import floating, rows, vector
from xuracore.ops.registry import primitive


# ---------------------------------------------------------------------- layer norm
def _layer_norm_forward(x, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last axis (Ba et al. 2016).

    x (..., D); weight and bias (D,) or None.
    """
    x = floating(x)
    seen = rows(x)
    scale = vector(weight, x.shape[-1], x.dtype, 1, "weight")
    shift = vector(bias, x.shape[-1], x.dtype, 0, "bias")
    y, mean, rstd = np.empty_like(seen), np.empty(len(seen), x.dtype), np.empty(len(seen), x.dtype)
    kernels.layer_norm_forward.sized(4 * x.size)(seen, scale, shift, float(eps), y, mean, rstd)
    return y.reshape(x.shape), (seen, scale, mean, rstd)


def _layer_norm_vjp(grad, saved, needs):
    seen, scale, mean, rstd = saved
    dx = np.empty_like(seen)
    dscale, dshift = _partial_sums(seen), _partial_sums(seen)
    call = kernels.layer_norm_backward.sized(6 * seen.size)
    call(rows(grad), seen, scale, mean, rstd, dx, dscale, dshift)
    return dx.reshape(grad.shape), dscale.sum(axis=0), dshift.sum(axis=0)


def _layer_norm_reference(x, weight=None, bias=None, eps=1e-5):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y * (1 if weight is None else weight) + (0 if bias is None else bias)


def _layer_norm_samples(rng):
    yield (rng.standard_normal((3, 2, 5)), rng.standard_normal(5), rng.standard_normal(5)), {}
    yield (rng.standard_normal((5, 4)).T, rng.standard_normal(5), None), {"eps": 1e-3}
    yield (rng.standard_normal(6), None, None), {"eps": 1e-3}
    yield (rng.standard_normal((0, 3)), rng.standard_normal(3), rng.standard_normal(3)), {}
    yield (rng.standard_normal((200, 3)), rng.standard_normal(3), rng.standard_normal(3)), {"eps": 1e-1}


layer_norm = primitive("layer_norm", _layer_norm_forward, _layer_norm_vjp, reference=_layer_norm_reference,
                       samples=_layer_norm_samples)


# ---------------------------------------------------------------------- RMS norm
def _rms_norm_forward(x, weight=None, eps=1e-6):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich 2019).

    x (..., D); weight (D,) or None.
    """
    x = floating(x)
    seen = rows(x)[:, None]
    scale = vector(weight, x.shape[-1], x.dtype, 1, "weight")[None]
    y, rstd = np.empty_like(seen), np.empty((len(seen), 1), x.dtype)
    kernels.rms_norm_forward.sized(3 * x.size)(seen, scale, float(eps), y, rstd)
    return y.reshape(x.shape), (seen, scale, rstd)


def _rms_norm_vjp(grad, saved, needs):
    seen, scale, rstd = saved
    dx, dscale = np.empty_like(seen), _partial_sums(seen)
    kernels.rms_norm_backward.sized(5 * seen.size)(rows(grad)[:, None], seen, scale, rstd, dx, dscale)
    return dx.reshape(grad.shape), dscale.sum(axis=0).reshape(-1)


def _partial_sums(seen):
    """Where a kernel puts its sums over blocks of rows of ``seen``."""
    return np.empty((kernels.row_blocks(len(seen)), *seen.shape[1:]), seen.dtype)


def _rms_norm_reference(x, weight=None, eps=1e-6):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (1 if weight is None else weight)


def _rms_norm_samples(rng):
    yield (rng.standard_normal((3, 2, 5)), rng.standard_normal(5)), {}
    yield (rng.standard_normal((5, 4)).T, rng.standard_normal(5)), {"eps": 1e-3}
    yield (rng.standard_normal(6), None), {}
    yield (rng.standard_normal((0, 3)), rng.standard_normal(3)), {}
    yield (rng.standard_normal((200, 3)), rng.standard_normal(3)), {"eps": 1e-2}


rms_norm = primitive("rms_norm", _rms_norm_forward, _rms_norm_vjp, reference=_rms_norm_reference,
                     samples=_rms_norm_samples)


def _gated_rms_norm_forward(x, z, weight=None, eps=1e-5, group_size=None, norm_before_gate=False):
    """RMS norm with a gate, as in Mamba-2 (Dao & Gu 2024).

    x, z (..., D), weight (D,) or None.  The norm is taken over groups of ``group_size`` neighbours
    (default: all D).  ``norm_before_gate`` False: norm(x silu(z)) weight; True: norm(x) weight silu(z).
    """
    x = floating(x)
    z = np.asarray(z, dtype=x.dtype)
    width = x.shape[-1]
    size = group_size or width
    if z.shape != x.shape:
        raise ShapeError(f"gated_rms_norm: x has shape {x.shape}, the gate {z.shape}; they must be equal")
    if size < 1 or width % size:
        raise ShapeError(f"gated_rms_norm: {width} channels do not divide into groups of {size}")
    grouped = (math.prod(x.shape[:-1]), width // size, size)
    seen, gate = rows(x).reshape(grouped), rows(z).reshape(grouped)
    scale = vector(weight, width, x.dtype, 1, "weight").reshape(grouped[1:])
    y, rstd = np.empty_like(seen), np.empty(grouped[:2], x.dtype)
    call = kernels.gated_rms_norm_forward.sized(12 * x.size)
    call(seen, gate, scale, float(eps), bool(norm_before_gate), y, rstd)
    return y.reshape(x.shape), (seen, gate, scale, bool(norm_before_gate), rstd)


def _gated_rms_norm_vjp(grad, saved, needs):
    seen, gate, scale, norm_first, rstd = saved
    dx, dz, dscale = np.empty_like(seen), np.empty_like(gate), _partial_sums(seen)
    call = kernels.gated_rms_norm_backward.sized(24 * seen.size)
    call(rows(grad).reshape(seen.shape), seen, gate, scale, norm_first, rstd, dx, dz, dscale)
    return dx.reshape(grad.shape), dz.reshape(grad.shape), dscale.sum(axis=0).reshape(-1)


def _gated_rms_norm_reference(x, z, weight=None, eps=1e-5, group_size=None, norm_before_gate=False):
    gate = z / (1 + np.exp(-z))
    size = group_size or x.shape[-1]
    u = (x if norm_before_gate else x * gate).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    y = (u / np.sqrt(np.mean(u * u, axis=-1, keepdims=True) + eps)).reshape(x.shape)
    return y * (1 if weight is None else weight) * (gate if norm_before_gate else 1)


def _gated_rms_norm_samples(rng):
    for norm_before_gate in (False, True):
        order = {"norm_before_gate": norm_before_gate}
        yield (*rng.standard_normal((2, 3, 2, 6)), rng.standard_normal(6)), {**order, "group_size": 3}
        yield (*rng.standard_normal((2, 4, 5)), None), {**order, "eps": 1e-2}
        yield (*rng.standard_normal((2, 0, 4)), rng.standard_normal(4)), order


gated_rms_norm = primitive("gated_rms_norm", _gated_rms_norm_forward, _gated_rms_norm_vjp,
                           reference=_gated_rms_norm_reference, samples=_gated_rms_norm_samples)


# ---------------------------------------------------------------------- unit length
def _l2_normalize_forward(x, axis=-1, eps=1e-12):
    """x / max(|x|, eps) along ``axis``: vectors of length one, for cosine similarity."""
    x = floating(x)
    length = np.maximum(np.sqrt(np.sum(x * x, axis=axis, keepdims=True)), x.dtype.type(eps))
    y = x / length
    return y, (y, length, axis, eps)


def _l2_normalize_vjp(grad, saved, needs):
    y, length, axis, eps = saved
    along = np.sum(grad * y, axis=axis, keepdims=True) * (length > eps)  # a clipped length is a constant
    return ((grad - y * along) / length,)


def _l2_normalize_samples(rng):
    yield (rng.standard_normal((3, 4)),), {}
    yield (rng.standard_normal((3, 4, 2)),), {"axis": 1}
    yield (rng.uniform(-0.1, 0.1, (2, 3)),), {"eps": 1.0}
    yield (rng.standard_normal((0, 3)),), {}


l2_normalize = primitive(
    "l2_normalize", _l2_normalize_forward, _l2_normalize_vjp, samples=_l2_normalize_samples,
    reference=lambda x, axis=-1, eps=1e-12: x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), eps))


# ---------------------------------------------------------------------- softmax and its logarithm
def _along(kernel, axis, cost, *arrays):
    """``kernel`` on the rows along ``axis`` of equal-shaped ``arrays``; the output in their shape."""
    last = axis in (-1, arrays[0].ndim - 1)
    moved = arrays if last else [np.moveaxis(a, axis, -1) for a in arrays]
    inputs = [rows(a) for a in moved]
    y = np.empty_like(inputs[-1])
    if y.size:
        kernel.sized(cost * y.size)(*inputs, y)
    y = y.reshape(moved[0].shape)
    return y if last else np.moveaxis(y, -1, axis)


def _softmax_forward(x, axis=-1):
    """exp(x) / Σ exp(x) along ``axis``; a score of -inf has weight exactly zero."""
    y = _along(softmax_kernels.softmax_forward, axis, 12, floating(x))
    return y, (y, axis)


def _softmax_vjp(grad, saved, needs):
    y, axis = saved
    return (_along(softmax_kernels.softmax_backward, axis, 4, grad, y),)


def _softmax_reference(x, axis=-1):
    e = np.exp(x - x.max(axis=axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_samples(rng):
    yield (3 * rng.standard_normal((3, 5)),), {}
    yield (3 * rng.standard_normal((2, 3, 4)),), {"axis": 1}
    yield (np.array([[300.0, 299.0, -300.0]]),), {"axis": -1}
    yield (rng.standard_normal((5, 2)).T,), {"axis": 0}
    yield (rng.standard_normal((3, 1)),), {}
    yield (rng.standard_normal((0, 3)),), {}


softmax = primitive("softmax", _softmax_forward, _softmax_vjp, reference=_softmax_reference,
                    samples=_softmax_samples)


def _log_softmax_forward(x, axis=-1):
    """x - log Σ exp(x) along ``axis``."""
    y = _along(softmax_kernels.log_softmax_forward, axis, 12, floating(x))
    return y, (y, axis)


def _log_softmax_vjp(grad, saved, needs):
    y, axis = saved
    return (_along(softmax_kernels.log_softmax_backward, axis, 12, grad, y),)


def _log_softmax_reference(x, axis=-1):
    shifted = x - x.max(axis=axis, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


log_softmax = primitive("log_softmax", _log_softmax_forward, _log_softmax_vjp,
                        reference=_log_softmax_reference, samples=_softmax_samples)
