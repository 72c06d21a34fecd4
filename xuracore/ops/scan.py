"""The selective scan of Mamba-1 as one op, state in and state out."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels import selective_scan as selective
from xuracore.ops.blocks import block_length, contiguous
from xuracore.ops.registry import primitive


def _selective_inputs(u, delta, a, b, c, skip, z, delta_bias, h):
    if u.ndim != 3 or a.ndim != 2 or b.ndim not in (3, 4):
        raise ShapeError(
            f"selective_scan: u {u.shape}, A {a.shape}, B {b.shape}; expected u (B, L, D), A (D, N), "
            "B (B, L, N) or (B, L, G, N)"
        )
    b, c = (x[:, :, None, :] if x.ndim == 3 else x for x in (b, c))
    (batch, length, channels), size, groups = u.shape, a.shape[1], b.shape[2]
    if groups == 0 or channels % groups:
        raise ShapeError(f"selective_scan: {groups} groups do not divide {channels} channels")
    shapes = {
        "u": u.shape,
        "delta": u.shape,
        "A": (channels, size),
        "B": (batch, length, groups, size),
        "C": (batch, length, groups, size),
        "D": (channels,),
        "z": u.shape if z is not None else (0, 0, 0),
        "delta_bias": (channels,),
        "h": (batch, channels, size),
    }
    dense = []
    for (name, shape), x in zip(shapes.items(), (u, delta, a, b, c, skip, z, delta_bias, h)):
        if x is not None and x.shape != shape:
            raise ShapeError(f"selective_scan: {name} has shape {x.shape}; expected {shape}")
        dense.append(contiguous(x, shape, u))
    return dense


def _selective_scan_forward(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None, *, delta_softplus=False
):  # fmt: skip
    """The selective scan of Mamba-1 (arXiv 2312.00752); returns (y (B, L, D), last state (B, D, N)).

    u, delta, z (B, L, D); A (D, N), negative; B, C (B, L, G, N), or (B, L, N) for one group; D,
    delta_bias (D,); h (B, D, N) the state before the first token.  D, z, delta_bias and h may be
    None: no skip, no gate, no bias, a fresh start.  delta_softplus : delta is given before softplus.
    Raises ShapeError.
    """
    inputs = _selective_inputs(u, delta, A, B, C, D, z, delta_bias, h)
    batch, length, channels = u.shape
    groups, size = inputs[3].shape[2:]
    block = block_length(length, size * selective.CHANNELS * u.itemsize)
    y, last = np.empty(u.shape, u.dtype), np.empty_like(inputs[8])
    stored = np.empty((batch, -(-length // block), size, channels), u.dtype)
    tasks, work = selective.tasks(batch, channels, groups), 20 * batch * length * channels * size
    call = selective.selective_scan_forward.split(tasks, work)
    call(*inputs, bool(delta_softplus), block, y, last, stored)
    return (y, last), (inputs, bool(delta_softplus), block, stored, B.ndim, C.ndim)


def _selective_scan_vjp(grad, saved, needs):
    inputs, soft, block, stored, b_ndim, c_ndim = saved
    u, b, h = inputs[0], inputs[3], inputs[8]
    (batch, length, channels), (groups, size) = u.shape, b.shape[2:]
    cotangents = [contiguous(g, shape, u) for g, shape in zip(grad, (u.shape, h.shape))]
    out = [np.empty(x.shape, u.dtype) for x in inputs]
    runs = selective.runs(channels, groups)
    out[2] = np.empty((batch, size, channels), u.dtype)
    out[3], out[4] = (np.empty((runs, *b.shape), u.dtype) for _ in range(2))
    out[5], out[7] = (np.empty((batch, channels), u.dtype) for _ in range(2))
    tasks, work = selective.tasks(batch, channels, groups), 60 * batch * length * channels * size
    call = selective.selective_scan_backward.split(tasks, work)
    call(*inputs[:8], soft, block, stored, *cotangents, *out)
    out[2] = out[2].sum(axis=0).T
    for i in (3, 4, 5, 7):
        out[i] = out[i].sum(axis=0)
    out[3] = out[3][:, :, 0] if b_ndim == 3 else out[3]
    out[4] = out[4][:, :, 0] if c_ndim == 3 else out[4]
    return tuple(out[: len(needs)])


def _selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None, *, delta_softplus=False
):  # fmt: skip
    """The defining recurrence, one token at a time."""
    batch, length, channels = u.shape
    delta = delta + (0 if delta_bias is None else delta_bias)
    delta = np.logaddexp(0, delta) if delta_softplus else delta
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))
    h = np.zeros((batch, channels, A.shape[1])) if h is None else h
    y = np.zeros(u.shape)
    for t in range(length):
        step = delta[:, t, :, None]
        h = np.exp(step * A) * h + step * B[:, t] * u[:, t, :, None]
        y[:, t] = (C[:, t] * h).sum(axis=2) + (0 if D is None else D * u[:, t])
    return (y if z is None else y * z / (1 + np.exp(-z))), h


def _selective_scan_samples(rng):
    for batch, length, channels, size, groups, full in (
        (2, 5, 4, 3, 1, True), (1, 4, 6, 2, 2, True), (2, 3, 3, 2, 0, False), (1, 1, 1, 1, 1, False),
    ):  # fmt: skip
        normal = rng.standard_normal
        mixing = (batch, length, groups, size) if groups else (batch, length, size)
        inputs = [
            normal((batch, length, channels)), rng.uniform(0.1, 1, (batch, length, channels)),
            -rng.uniform(0.2, 2, (channels, size)), normal(mixing), normal(mixing),
        ]  # fmt: skip
        if full:
            inputs += [normal(channels), normal((batch, length, channels)), normal(channels)]
            inputs += [normal((batch, channels, size))]
        yield tuple(inputs), {"delta_softplus": full}


selective_scan = primitive(
    "selective_scan", _selective_scan_forward, _selective_scan_vjp,
    reference=_selective_scan_reference, samples=_selective_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip
