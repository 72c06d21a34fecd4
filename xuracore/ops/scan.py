"""The selective scan of Mamba-1 as one op, state in and state out."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels import selective_scan as selective
from xuracore.kernels import selective_scan_complex as complex_scan
from xuracore.ops.blocks import Spans, block_length, contiguous, sequences
from xuracore.ops.registry import primitive


def _selective_inputs(u, delta, a, b, c, skip, z, delta_bias, h, count):
    pair = (2,) if a.ndim == 3 else ()  # real and imaginary parts
    if u.ndim != 3 or a.ndim not in (2, 3) or a.shape[2:] != pair or b.ndim - len(pair) not in (3, 4):
        raise ShapeError(
            f"selective_scan: u {u.shape}, A {a.shape}, B {b.shape}; expected u (B, L, D), A (D, N), "
            "B (B, L, N) or (B, L, G, N); A and B with one more axis of 2 where A is complex"
        )
    b, c = (x[:, :, None] if x.ndim == 3 + len(pair) else x for x in (b, c))
    (batch, length, channels), size, groups = u.shape, a.shape[1], b.shape[2]
    if groups == 0 or channels % groups:
        raise ShapeError(f"selective_scan: {groups} groups do not divide {channels} channels")
    shapes = {
        "u": u.shape,
        "delta": u.shape,
        "A": (channels, size, *pair),
        "B": (batch, length, groups, size, *pair),
        "C": (batch, length, groups, size, *pair),
        "D": (channels,),
        "z": u.shape if z is not None else (0, 0, 0),
        "delta_bias": (channels,),
        "h": (count, channels, size, *pair),
    }
    dense = []
    for (name, shape), x in zip(shapes.items(), (u, delta, a, b, c, skip, z, delta_bias, h)):
        if x is not None and x.shape != shape:
            raise ShapeError(f"selective_scan: {name} has shape {x.shape}; expected {shape}")
        x = contiguous(x, shape, u)
        in_time = name in ("u", "delta", "B", "C", "z")
        dense.append(x.reshape(shape[0] * shape[1], *shape[2:]) if in_time else x)
    return dense


def _selective_kernels(a):
    if a.ndim == 3:
        return complex_scan.complex_scan_forward, complex_scan.complex_scan_backward
    return selective.selective_scan_forward, selective.selective_scan_backward


def _selective_scan_forward(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None,
    *, delta_softplus=False, dt_limit=None, cu_seqlens=None,
):  # fmt: skip
    """The selective scan of Mamba-1 (arXiv 2312.00752); returns (y (B, L, D), last state (B, D, N)).

    u, delta, z (B, L, D); A (D, N), negative; B, C (B, L, G, N), or (B, L, N) for one group; D,
    delta_bias (D,); h (B, D, N) the state before the first token.  D, z, delta_bias and h may be
    None: no skip, no gate, no bias, a fresh start.
    A complex A is (D, N, 2), real and imaginary parts; then B and C are (B, L, G, N, 2) or (B, L, N, 2),
    h is (B, D, N, 2), and y = 2 Re sum C h: each number stands for a conjugate pair.
    delta_softplus : delta is given before softplus.   dt_limit : (low, high), where delta is clipped.
    cu_seqlens : (n + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the row,
        and the states are (n, D, N).
    Raises ShapeError.
    """
    spans = Spans(u.shape, cu_seqlens, "selective_scan")
    inputs = _selective_inputs(u, delta, A, B, C, D, z, delta_bias, h, spans.count)
    tokens, channels = inputs[0].shape
    parts, (groups, size) = inputs[2].shape[2:], inputs[3].shape[1:3]
    scratch = 2 * inputs[2][0].size * selective.CHANNELS * u.itemsize  # a token's; a core's L2 holds 64
    block = block_length(spans.longest, scratch // 4)
    rows = spans.rows(block)
    low, high = (-np.inf, np.inf) if dt_limit is None else dt_limit
    options = spans.edges, rows, u.dtype.type(low), u.dtype.type(high), bool(delta_softplus), block
    y, last = np.empty((tokens, channels), u.dtype), np.empty_like(inputs[8])
    stored = np.empty((rows[-1], size, *parts, channels), u.dtype)
    tasks, work = selective.tasks(spans.count, channels, groups), 20 * tokens * channels * size
    _selective_kernels(inputs[2])[0].split(tasks, work)(*inputs, *options, y, last, stored)
    return (y.reshape(u.shape), last), (inputs, options, stored, tasks, work, B.shape, C.shape, u.shape)


def _selective_scan_vjp(grad, saved, needs):
    inputs, options, stored, tasks, work, b_shape, c_shape, shape = saved
    u, b, h = inputs[0], inputs[3], inputs[8]
    channels, groups, count = u.shape[1], b.shape[1], len(h)
    cotangents = [contiguous(g, form, u).reshape(form) for g, form in zip(grad, (u.shape, h.shape))]
    out = [np.empty(x.shape, u.dtype) for x in inputs]
    out[2] = np.empty((count, *b.shape[2:], channels), u.dtype)
    out[3], out[4] = (np.empty((selective.runs(channels, groups), *b.shape), u.dtype) for _ in range(2))
    out[5], out[7] = (np.empty((count, channels), u.dtype) for _ in range(2))
    call = _selective_kernels(inputs[2])[1].split(tasks, 3 * work)
    call(*inputs[:8], *options, stored, *cotangents, *out)
    for i in (2, 3, 4, 5, 7):
        out[i] = out[i][0] if len(out[i]) == 1 else out[i].sum(axis=0)
    forms = {0: shape, 1: shape, 3: b_shape, 4: c_shape, 6: shape}
    out[2] = np.moveaxis(out[2], -1, 0)
    for i, form in forms.items():
        out[i] = out[i].reshape(form) if i < len(needs) and (i != 6 or out[6].size) else None
    return tuple(out[: len(needs)])


def _selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None,
    *, delta_softplus=False, dt_limit=None, cu_seqlens=None,
):  # fmt: skip
    """The defining recurrence, one sequence and token at a time."""
    batch, length, channels = u.shape
    delta = delta + (0 if delta_bias is None else delta_bias)
    delta = np.logaddexp(0, delta) if delta_softplus else delta
    delta = delta if dt_limit is None else np.clip(delta, *dt_limit)
    scale, pair = 1, A.ndim == 3
    if pair:
        scale, (A, B, C) = 2, (x[..., 0] + 1j * x[..., 1] for x in (A, B, C))
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))
    spans = sequences(u.shape, cu_seqlens, "selective_scan")
    last = np.zeros((len(spans), *A.shape), A.dtype)
    if h is not None:
        last += h[..., 0] + 1j * h[..., 1] if pair else h
    y = np.zeros(u.shape)
    for s, (row, start, stop) in enumerate(spans):
        for t in range(start, stop):
            step = delta[row, t, :, None]
            last[s] = np.exp(step * A) * last[s] + step * B[row, t] * u[row, t, :, None]
            y[row, t] = scale * (C[row, t] * last[s]).sum(axis=1).real + (0 if D is None else D * u[row, t])
    last = np.stack([last.real, last.imag], axis=-1) if pair else last
    return (y if z is None else y * z / (1 + np.exp(-z))), last


def _selective_scan_samples(rng):
    for batch, length, channels, size, groups, full, options in (
        (2, 5, 4, 3, 1, True, {}), (1, 4, 6, 2, 2, True, {"dt_limit": (0.5, 0.9)}), (2, 3, 3, 2, 0, False, {}),
        (1, 1, 1, 1, 1, False, {}), (1, 7, 3, 2, 1, True, {"cu_seqlens": np.array([0, 3, 3, 4, 7])}),
    ):  # fmt: skip
        normal = rng.standard_normal
        mixing = (batch, length, groups, size) if groups else (batch, length, size)
        inputs = [
            normal((batch, length, channels)), rng.uniform(0.1, 1, (batch, length, channels)),
            -rng.uniform(0.2, 2, (channels, size)), normal(mixing), normal(mixing),
        ]  # fmt: skip
        if full:
            inputs += [normal(channels), normal((batch, length, channels)), normal(channels)]
            inputs += [normal((len(options.get("cu_seqlens", range(batch + 1))) - 1, channels, size))]
        yield tuple(inputs), {"delta_softplus": full, **options}
    normal = rng.standard_normal
    yield (
        normal((2, 4, 4)), rng.uniform(0.1, 1, (2, 4, 4)),
        np.stack([-rng.uniform(0.2, 2, (4, 2)), 3 * normal((4, 2))], axis=-1), normal((2, 4, 2, 2, 2)),
        normal((2, 4, 2, 2, 2)), normal(4), normal((2, 4, 4)), normal(4), normal((2, 4, 2, 2)),
    ), {"delta_softplus": True}
    yield (
        normal((1, 5, 2)), rng.uniform(0.1, 1, (1, 5, 2)), -rng.uniform(0.2, 2, (2, 3, 2)),
        normal((1, 5, 3, 2)), normal((1, 5, 3, 2)),
    ), {"cu_seqlens": np.array([0, 2, 5]), "dt_limit": (0.3, 0.8)}


selective_scan = primitive(
    "selective_scan", _selective_scan_forward, _selective_scan_vjp,
    reference=_selective_scan_reference, samples=_selective_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip
