"""The scan of Mamba-2 (SSD) as one op, state in and state out."""

import math

import numpy as np

from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import activation
from xuracore.ops.blocks import contiguous, sequences
from xuracore.ops.chunked import CHUNK_ROWS, Grouped, scan, scan_gradient
from xuracore.ops.registry import primitive


def _ssd_inputs(x, dt, a, b, c, skip, z, dt_bias, h, spans):
    if x.ndim != 4 or b.ndim != 4 or b.shape[2] == 0 or x.shape[2] % b.shape[2]:
        raise ShapeError(
            f"ssd_scan: x {x.shape}, B {b.shape}; expected (B, L, H, P) and (B, L, G, N) with G dividing H"
        )
    batch, length, heads, width = x.shape
    keyed = (batch, length, *b.shape[2:])
    shapes = {
        "x": x.shape,
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": keyed,
        "C": keyed,
        "D": (heads, width) if skip is not None and skip.ndim == 2 else (heads,),
        "z": x.shape,
        "dt_bias": (heads,),
        "h": (len(spans), heads, width, b.shape[3]),
    }
    dense = []
    for (name, shape), given in zip(shapes.items(), (x, dt, a, b, c, skip, z, dt_bias, h)):
        if given is not None and given.shape != shape:
            raise ShapeError(f"ssd_scan: {name} has shape {given.shape}; expected {shape}")
        if name == "h":  # states are (N, P) in memory: what a call returns comes back without a copy
            given = np.zeros(shape, x.dtype).swapaxes(2, 3) if given is None else given.swapaxes(2, 3)
        dense.append(given if given is None and name == "z" else contiguous(given, shape, x))
    return dense


def _softplus(x):
    y = np.empty_like(x)
    activation.softplus_forward.sized(20 * x.size)(x.reshape(-1), y.reshape(-1))
    return y


def _ssd_scan_forward(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, h=None,
    *, dt_softplus=False, dt_limit=(0.0, math.inf), chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The scan of Mamba-2 (SSD, arXiv 2405.21060), in chunks → (y (B, L, H, P), last state (S, H, P, N)).

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t, times silu(z_t) if z is given.

    x, z (B, L, H, P); dt (B, L, H); A (H,), negative; B, C (B, L, G, N), head h reads group h // (H / G);
    D (H,) or (H, P); dt_bias (H,); h (S, H, P, N) the state before the first token, S = B.
    D, z, dt_bias and h may be None: no skip, no gate, no bias, a fresh start.
    dt_softplus : dt is given before softplus.   dt_limit : dt is clipped to this range afterwards.
    chunk : tokens per product, at most; the numbers do not depend on it.
    cu_seqlens : (S + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the row.
    Raises ShapeError, ConfigError.
    """
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ConfigError(f"dt_limit={dt_limit}; expected 0 <= least <= greatest")
    spans = sequences(x.shape, cu_seqlens, "ssd_scan")
    x, dt, a, b, c, skip, z, bias, h = _ssd_inputs(x, dt, A, B, C, D, z, dt_bias, h, spans)
    raw = dt + bias
    step = _softplus(raw) if dt_softplus else raw
    inside = (step >= low) & (step <= high)
    step = np.clip(step, x.dtype.type(low), x.dtype.type(high))
    direct = skip if skip.ndim == 1 else np.zeros(x.shape[2], x.dtype)
    source, inputs = Grouped(c, b, x.shape[2]), (x, step * a, step, step, direct)
    y, last, kept = scan(source, *inputs, h, spans, chunk)
    if skip.ndim == 2:
        y += skip * x
    before, gate = y, None
    if z is not None:
        gate = np.empty_like(z)
        activation.silu_forward.sized(8 * z.size)(z.reshape(-1), gate.reshape(-1))
        y = y * gate
    saved = source, inputs, a, raw, inside, skip, z, before, gate, kept, h.shape, dt_softplus
    return (y, last.swapaxes(2, 3)), saved


def _ssd_scan_vjp(grad, saved, needs):
    source, inputs, a, raw, inside, skip, z, before, gate, kept, states, soft = saved
    x, step = inputs[0], inputs[2]
    count, heads, size, width = states
    gy, glast = (contiguous(g, s, x) for g, s in zip(grad, (x.shape, (count, heads, width, size))))
    gz = None
    if z is not None:
        gz = np.empty_like(z)
        through = (gy * before).reshape(-1)
        activation.silu_backward.sized(8 * z.size)(through, z.reshape(-1), gz.reshape(-1))
        gy = gy * gate
    gx, glog, ggain, gown, gskip, gh = scan_gradient(
        source, *inputs, kept, gy, np.ascontiguousarray(glast.swapaxes(2, 3))
    )
    gc, gb = source.gradients()
    if skip.ndim == 2:
        gskip = np.einsum("blhp,blhp->hp", gy, x)
        gx += skip * gy
    gstep = np.where(inside, ggain + gown + glog * a, 0)
    if soft:
        gstep *= 1 / (1 + np.exp(-np.maximum(raw, x.dtype.type(-80))))
    gstep = gstep.astype(x.dtype, copy=False)
    ga = np.einsum("blh,blh->h", glog, step)
    return gx, gstep, ga, gb, gc, gskip, gz, gstep.sum(axis=(0, 1)), gh.swapaxes(2, 3)


def _ssd_scan_reference(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, h=None,
    *, dt_softplus=False, dt_limit=(0.0, math.inf), chunk=CHUNK_ROWS, cu_seqlens=None,
):  # fmt: skip
    """The defining recurrence, one token at a time."""
    heads, width = x.shape[2:]
    dt = dt + (0 if dt_bias is None else dt_bias)
    dt = np.clip(np.logaddexp(0, dt) if dt_softplus else dt, *dt_limit)
    B, C = (np.repeat(m, heads // m.shape[2], axis=2) for m in (B, C))
    spans = sequences(x.shape, cu_seqlens, "ssd_scan")
    h = np.zeros((len(spans), heads, width, B.shape[3])) if h is None else h.copy()
    skip = np.zeros((heads, 1)) if D is None else D.reshape(heads, -1)
    y = np.zeros(x.shape)
    for place, (b, start, stop) in enumerate(spans):
        for t in range(start, stop):
            push = (dt[b, t, :, None] * x[b, t])[:, :, None] * B[b, t][:, None, :]
            h[place] = np.exp(dt[b, t] * A)[:, None, None] * h[place] + push
            y[b, t] = np.einsum("hpn,hn->hp", h[place], C[b, t]) + skip * x[b, t]
    return (y if z is None else y * z / (1 + np.exp(-z))), h


def _ssd_scan_samples(rng):
    for batch, length, heads, width, groups, size, full, packed in (
        (2, 5, 2, 3, 1, 2, True, None),
        (1, 67, 2, 1, 2, 2, False, None),
        (1, 13, 4, 2, 2, 3, True, (0, 2, 2, 13)),
        (1, 1, 1, 1, 1, 1, False, None),
    ):
        normal = rng.standard_normal
        inputs = [
            normal((batch, length, heads, width)), rng.uniform(0.1, 1, (batch, length, heads)),
            -rng.uniform(0.2, 2, heads), normal((batch, length, groups, size)),
            normal((batch, length, groups, size)),
        ]  # fmt: skip
        options = {}
        if full:
            count = len(packed) - 1 if packed else batch
            inputs += [normal((heads, width) if packed else heads), normal((batch, length, heads, width))]
            inputs += [normal(heads), normal((count, heads, width, size))]
            options = {"dt_softplus": True, "dt_limit": (0.3, 1.7), "chunk": 2, "cu_seqlens": packed}
        yield tuple(inputs), options


ssd_scan = primitive(
    "ssd_scan", _ssd_scan_forward, _ssd_scan_vjp,
    reference=_ssd_scan_reference, samples=_ssd_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip
