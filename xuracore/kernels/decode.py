"""One token through one residual layer, x + mixer(norm(x)): up to the state, the state, and from there on.

At one token a layer is its weights: each is read once (:mod:`xuracore.kernels.gemv`), and what follows a
product is done by the task that has made its rows, while they are in the cache.  The state of Mamba-3 is in
:mod:`xuracore.kernels.decode_mamba3`.

x (B, D) float32.  Matrices are pairs (weight, scales) as in gemv; the scan of Mamba-1 has its channels in
multiples of 32.  States, ``past`` (B, K - 1, channels) of the convolution and ``h``, become those after the
token.  The number of tasks does not depend on the number of threads, so the results do not either.
"""

import numpy as np

from xuracore.jit import REDUCE, device, kernel, prange
from xuracore.kernels.fastmath import exp, silu, softplus
from xuracore.kernels.gemv import PANEL, ZERO, dequantised, product

GATE_ONLY, GATE_THEN_NORM, NORM_THEN_GATE = 0, 1, 2


@device
def _rms_norm(x, weight, eps):
    out = np.empty(x.shape, np.float32)
    for b in range(x.shape[0]):
        row, into, total = x[b], out[b], ZERO
        for i in range(row.size):
            total += row[i] * row[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + np.float32(eps))
        for i in range(row.size):
            into[i] = row[i] * scale * weight[i]
    return out


@device
def _norm_pieces(x, first, second, eps):
    """RMS norms without weights of x[:, :first], x[:, first:second] and x[:, second:]; none for a negative eps."""
    out = x.copy()
    for b in range(x.shape[0] if eps >= 0 else 0):
        for piece in range(3):
            start = 0 if piece == 0 else first if piece == 1 else second
            row = out[b, start : first if piece == 0 else second if piece == 1 else x.shape[1]]
            total = ZERO
            for i in range(row.size):
                total += row[i] * row[i]
            scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + np.float32(eps))
            for i in range(row.size):
                row[i] *= scale
    return out


@device
def _convolve(new, weight, bias, past, first, last, out):
    """out[first:last] = silu of those channels of the causal convolution; the past moves on by ``new[first:last]``.

    One loop a term: each is vector code, and the channels of a task stay in the cache.
    """
    before = weight.shape[1] - 1
    for d in range(first, last):
        out[d] = bias[d] + weight[d, before] * new[d]
    for k in range(before):
        then = past[k]
        for d in range(first, last):
            out[d] += weight[d, k] * then[d]
    for k in range(before):
        then, source = past[k], past[k + 1] if k + 1 < before else new
        for d in range(first, last):
            then[d] = source[d]
    for d in range(first, last):
        out[d] = silu(out[d])


def rms_norm_numpy(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _product_numpy(x, weight, scales, rows):
    return x @ dequantised(weight, scales)[:rows].T


def silu_numpy(x):
    return x * (0.5 * (1 + np.tanh(0.5 * x)))


def _convolve_numpy(u, weight, bias, past):
    window = np.concatenate([past, u[:, None]], axis=1)
    past[...] = window[:, 1:]
    return silu_numpy(np.einsum("bkc,ck->bc", window, weight) + bias)


def project_numpy(x, norm_weight, eps, weight, scales, bias, tasks, y):
    y[...] = _product_numpy(rms_norm_numpy(x, norm_weight, eps), weight, scales, y.shape[1]) + bias


@kernel(twin=project_numpy, parallel=True, fastmath=REDUCE)
def project(x, norm_weight, eps, weight, scales, bias, tasks, y):
    """y (B, rows) = norm(x) Wᵀ + bias: in_proj of Mamba-3, and the head."""
    rows = y.shape[1]
    panels = (rows + PANEL - 1) // PANEL
    normed = _rms_norm(x, norm_weight, eps)
    for index in prange(tasks):
        task = np.int64(index)
        first = panels * task // tasks * PANEL
        last = min(panels * (task + 1) // tasks * PANEL, rows)
        product(weight, scales, normed, 0, x.shape[1], first, last, y)
        for b in range(x.shape[0]):
            for r in range(first, last):
                y[b, r] += bias[r]


def mamba1_project_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, past, gate, u, tasks
):  # fmt: skip
    inner = u.shape[1]
    both = _product_numpy(rms_norm_numpy(x, norm_weight, eps), in_weight, in_scales, 2 * inner) + in_bias
    u[...] = _convolve_numpy(both[:, :inner], conv_weight, conv_bias, past)
    gate[...] = silu_numpy(both[:, inner:])


@kernel(twin=mamba1_project_numpy, parallel=True, fastmath=REDUCE)
def mamba1_project(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, past, gate, u, tasks
):  # fmt: skip
    """Mamba-1 (arXiv 2312.00752) up to its convolution: gate and u (B, Di).  Biases are zeros if absent."""
    batch, inner = u.shape
    units, width = inner // PANEL, x.shape[1]
    normed = _rms_norm(x, norm_weight, eps)
    both = np.empty((batch, 2 * inner), np.float32)
    for index in prange(tasks):
        task = np.int64(index)
        first, last = units * task // tasks * PANEL, units * (task + 1) // tasks * PANEL
        for start in range(0, 2 * inner, inner):
            product(in_weight, in_scales, normed, 0, width, start + first, start + last, both)
        for b in range(batch):
            row, into = both[b], gate[b]
            for d in range(first, last):
                row[d] += in_bias[d]
            for d in range(first, last):
                into[d] = silu(row[inner + d] + in_bias[inner + d])
            _convolve(row, conv_weight, conv_bias, past[b], first, last, u[b])


def mamba1_scan_numpy(
    mix, inner_eps, dt_weight, dt_scales, dt_bias, a_log, skip, gate, u, h, tasks
):
    (inner, size), rank = a_log.shape, dt_weight.shape[1]
    low, b, c = np.split(mix, [rank, rank + size], axis=1)
    if inner_eps >= 0:
        low, b, c = (rms_norm_numpy(each, 1, inner_eps) for each in (low, b, c))
    step = np.logaddexp(0, _product_numpy(low, dt_weight, dt_scales, inner) + dt_bias).astype(np.float32)
    h[...] = np.exp(-step[:, :, None] * np.exp(a_log)) * h + (step * u)[:, :, None] * b[:, None]
    u[...] = (np.einsum("bdn,bn->bd", h, c) + skip * u) * gate


@kernel(twin=mamba1_scan_numpy, parallel=True, fastmath=REDUCE)
def mamba1_scan(
    mix, inner_eps, dt_weight, dt_scales, dt_bias, a_log, skip, gate, u, h, tasks
):
    """Mamba-1's state: mix = x_proj(u) (B, R + 2 N); h (B, Di, N) is then after the token, u the gated output.

    inner_eps : of the norms of FalconMamba on dt, B and C; negative for none.
    """
    (batch, inner), rank, size = u.shape, dt_weight.shape[1], a_log.shape[1]
    units = inner // PANEL
    normed = _norm_pieces(mix, rank, rank + size, inner_eps)
    delta = np.empty((batch, inner), np.float32)
    for index in prange(tasks):
        task = np.int64(index)
        first, last = units * task // tasks * PANEL, units * (task + 1) // tasks * PANEL
        product(dt_weight, dt_scales, normed, 0, rank, first, last, delta)
        rates = a_log[first:last].reshape(-1)
        keep = np.empty(rates.size, np.float32)
        for b in range(batch):
            keys, queries, steps = normed[b, rank : rank + size], normed[b, rank + size :], delta[b]
            for d in range(first, last):
                steps[d] = softplus(steps[d] + dt_bias[d])
            for i in range(keep.size):
                keep[i] = exp(rates[i])
            for d in range(first, last):
                row = keep[(d - first) * size : (d - first + 1) * size]
                for n in range(size):
                    row[n] *= -steps[d]
            for i in range(keep.size):
                keep[i] = exp(keep[i])
            for d in range(first, last):
                row = keep[(d - first) * size : (d - first + 1) * size]
                push, state, total = steps[d] * u[b, d], h[b, d], ZERO
                for n in range(size):
                    value = row[n] * state[n] + push * keys[n]
                    state[n] = value
                    total += value * queries[n]
                u[b, d] = (total + skip[d] * u[b, d]) * gate[b, d]


def mamba2_project_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max, past,
    gate, u, steps, tasks,
):  # fmt: skip
    inner, channels = gate.shape[1], u.shape[1]
    normed = rms_norm_numpy(x, norm_weight, eps)
    projected = _product_numpy(normed, in_weight, in_scales, inner + channels + steps.shape[1]) + in_bias
    z, new, raw = np.split(projected, [inner, inner + channels], axis=1)
    gate[...] = silu_numpy(z)
    u[...] = _convolve_numpy(new, conv_weight, conv_bias, past)
    steps[...] = np.clip(np.logaddexp(0, raw + dt_bias), dt_min, dt_max)


@kernel(twin=mamba2_project_numpy, parallel=True, fastmath=REDUCE)
def mamba2_project(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max, past,
    gate, u, steps, tasks,
):  # fmt: skip
    """Mamba-2 (arXiv 2405.21060) up to its state: gate (B, Di), u (B, Di + 2 G N) and steps (B, H).

    Biases are zeros if absent.
    """
    (batch, width), inner, channels = x.shape, gate.shape[1], u.shape[1]
    rows = inner + channels + steps.shape[1]
    panels = (rows + PANEL - 1) // PANEL
    low_dt, high_dt = np.float32(dt_min), np.float32(dt_max)
    normed = _rms_norm(x, norm_weight, eps)
    projected = np.empty((batch, rows), np.float32)
    for index in prange(tasks):
        task = np.int64(index)
        first = panels * task // tasks * PANEL
        last = min(panels * (task + 1) // tasks * PANEL, rows)
        product(in_weight, in_scales, normed, 0, width, first, last, projected)
        for b in range(batch):
            row, into = projected[b], gate[b]
            for r in range(first, last):
                row[r] += in_bias[r]
            for r in range(first, min(last, inner)):
                into[r] = silu(row[r])
            start, stop = max(first, inner) - inner, min(last, inner + channels) - inner
            if start < stop:
                _convolve(row[inner:], conv_weight, conv_bias, past[b], start, stop, u[b])
            for r in range(max(first, inner + channels), last):
                step = softplus(row[r] + dt_bias[r - inner - channels])
                steps[b, r - inner - channels] = min(max(step, low_dt), high_dt)


def mamba2_scan_numpy(u, steps, a_log, skip, groups, gating, gate, gate_weight, h, y, squares):
    batch, heads, headdim, size = h.shape
    inner = heads * headdim
    xs = u[:, :inner].reshape(batch, heads, headdim, 1)
    key, query = (
        np.repeat(part.reshape(batch, groups, 1, size), heads // groups, axis=1)
        for part in np.split(u[:, inner:], 2, axis=1)
    )
    step = steps[:, :, None, None]
    h[...] = np.exp(-step * np.exp(a_log)[:, None, None]) * h + step * xs * key
    inside = ((h * query).sum(axis=3) + skip * xs[..., 0]).reshape(batch, inner)
    y[...] = inside * gate * gate_weight
    counted = inside if gating == NORM_THEN_GATE else inside * gate
    squares[...] = (counted * counted).reshape(batch, len(squares), -1).sum(axis=2).T


@kernel(twin=mamba2_scan_numpy, parallel=True, fastmath=REDUCE)
def mamba2_scan(u, steps, a_log, skip, groups, gating, gate, gate_weight, h, y, squares):
    """Mamba-2's state: h (B, H, P, N) after the token, and the gated output y (B, Di).

    skip (H, P) or (H, 1); gating is one of GATE_ONLY, GATE_THEN_NORM, NORM_THEN_GATE.  A norm's divisor is
    common to its group and left to :func:`residual`: squares (tasks, B) are the sums it needs.  There are a
    multiple of groups tasks, a divisor of the heads.
    """
    batch, heads, headdim, size = h.shape
    tasks, inner = squares.shape[0], heads * headdim
    per_task = heads // tasks
    for index in prange(tasks):
        task = np.int64(index)
        for b in range(batch):
            total = ZERO
            for head in range(task * per_task, (task + 1) * per_task):
                start = inner + head // (heads // groups) * size
                key, query = u[b, start : start + size], u[b, start + groups * size : start + (groups + 1) * size]
                keep = exp(-steps[b, head] * exp(a_log[head]))
                for p in range(headdim):
                    at = head * headdim + p
                    state, push, inside = h[b, head, p], steps[b, head] * u[b, at], ZERO
                    for n in range(size):
                        value = keep * state[n] + push * key[n]
                        state[n] = value
                        inside += value * query[n]
                    inside += skip[head, p % skip.shape[1]] * u[b, at]
                    gated = inside * gate[b, at]
                    if gating == NORM_THEN_GATE:
                        total += inside * inside
                    else:
                        total += gated * gated
                    y[b, at] = gated * gate_weight[at]
            squares[task, b] = total


@device
def _scaled(y, squares, groups, count, eps):
    """y with each group divided by its norm."""
    out = y.copy()
    per_group = squares.shape[0] // groups
    for b in range(y.shape[0] if squares.size > 0 else 0):
        for g in range(groups):
            total, row = ZERO, out[b, g * count : (g + 1) * count]
            for task in range(g * per_group, (g + 1) * per_group):
                total += squares[task, b]
            scale = np.float32(1) / np.sqrt(total / np.float32(count) + np.float32(eps))
            for i in range(row.size):
                row[i] *= scale
    return out


def residual_numpy(x, y, squares, groups, count, eps, weight, scales, bias, tasks):
    if squares.size:
        sums = squares.reshape(groups, -1, len(x)).sum(axis=1).T
        y = (y.reshape(len(x), groups, -1) / np.sqrt(sums / np.float32(count) + np.float32(eps))[:, :, None]).reshape(
            y.shape
        )
    x += _product_numpy(y, weight, scales, x.shape[1]) + bias


@kernel(twin=residual_numpy, parallel=True, fastmath=REDUCE)
def residual(x, y, squares, groups, count, eps, weight, scales, bias, tasks):
    """x (B, D) += out_proj of y (B, Di), each group of which is divided by its norm.

    squares : (any, B), sums over the ``count`` numbers of each group; (0, 0) where there is no norm.
    """
    batch, width = x.shape
    panels = (width + PANEL - 1) // PANEL
    scaled = _scaled(y, squares, groups, count, eps)
    out = np.empty((batch, width), np.float32)
    for index in prange(tasks):
        task = np.int64(index)
        first = panels * task // tasks * PANEL
        last = min(panels * (task + 1) // tasks * PANEL, width)
        product(weight, scales, scaled, 0, y.shape[1], first, last, out)
        for b in range(batch):
            for r in range(first, last):
                x[b, r] += out[b, r] + bias[r]
