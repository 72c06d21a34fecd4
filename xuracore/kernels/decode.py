"""One token through one residual layer, x + mixer(norm(x)), as one kernel with two parallel regions.

At one token a layer is its weights: each is read once (:mod:`xuracore.kernels.gemv`), and what lies
between the products is done where their results are.  The second product of a region takes columns, not
rows: task i multiplies the channels it has just made with their columns, and the sums over tasks are
formed afterwards, in order, so that no thread waits for another in between.

x (B, D) float32 is changed in place.  Matrices are pairs (weight, scales) as in gemv; the scan has its
channels in multiples of 32.  The states after the token go to ``conv_out`` and ``h_out``, which may be
``conv_in`` and ``h_in`` themselves.  ``tasks`` does not depend on the number of threads, so the numbers
do not either.
"""

import numpy as np

from xuracore.jit import REDUCE, device, kernel, prange
from xuracore.kernels.fastmath import exp, silu, softplus
from xuracore.kernels.gemv import PANEL, ZERO, dequantised, product

GATE_ONLY, GATE_THEN_NORM, NORM_THEN_GATE = 0, 1, 2


@device
def _rms_norm(x, weight, eps, out):
    for b in range(x.shape[0]):
        row, into, total = x[b], out[b], ZERO
        for i in range(row.size):
            total += row[i] * row[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + np.float32(eps))
        for i in range(row.size):
            into[i] = row[i] * scale * weight[i]


@device
def _convolve(new, row, weight, bias, before, after, channel):
    """Channel of the causal convolution with silu; the past moves on by one."""
    past = weight.shape[1] - 1
    total = bias[channel] + weight[channel, past] * new
    for k in range(past):
        total += weight[channel, k] * before[row, k, channel]
    for k in range(past - 1):
        after[row, k, channel] = before[row, k + 1, channel]
    if past > 0:
        after[row, past - 1, channel] = new
    return silu(total)


def _rms_norm_numpy(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _product_numpy(x, weight, scales, rows):
    return x @ dequantised(weight, scales)[:rows].T


def _silu_numpy(x):
    return x * (0.5 * (1 + np.tanh(0.5 * x)))


def _convolve_numpy(u, weight, bias, before, after):
    window = np.concatenate([before, u[:, None]], axis=1)
    after[...] = window[:, 1:]
    return _silu_numpy(np.einsum("bkc,ck->bc", window, weight) + bias)


def mamba1_step_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, x_weight, x_scales,
    dt_weight, dt_scales, dt_bias, a_log, skip, out_weight, out_scales, out_bias, inner_eps, tasks,
    conv_in, h_in, conv_out, h_out,
):  # fmt: skip
    """NumPy twin of :func:`mamba1_step`."""
    inner, size = a_log.shape
    rank = dt_weight.shape[1]
    normed = _rms_norm_numpy(x, norm_weight, eps)
    both = _product_numpy(normed, in_weight, in_scales, 2 * inner) + in_bias
    u = _convolve_numpy(both[:, :inner], conv_weight, conv_bias, conv_in, conv_out)
    low, b, c = np.split(_product_numpy(u, x_weight, x_scales, rank + 2 * size), [rank, rank + size], axis=1)
    if inner_eps >= 0:
        low, b, c = (_rms_norm_numpy(each, 1, inner_eps) for each in (low, b, c))
    step = np.logaddexp(0, _product_numpy(low, dt_weight, dt_scales, inner) + dt_bias).astype(np.float32)
    h = np.exp(-step[:, :, None] * np.exp(a_log)) * h_in + (step * u)[:, :, None] * b[:, None]
    h_out[...] = h
    y = (np.einsum("bdn,bn->bd", h, c) + skip * u) * _silu_numpy(both[:, inner:])
    x += _product_numpy(y, out_weight, out_scales, x.shape[1]) + out_bias


@kernel(twin=mamba1_step_numpy, parallel=True, fastmath=REDUCE)
def mamba1_step(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, x_weight, x_scales,
    dt_weight, dt_scales, dt_bias, a_log, skip, out_weight, out_scales, out_bias, inner_eps, tasks,
    conv_in, h_in, conv_out, h_out,
):  # fmt: skip
    """Mamba-1 (arXiv 2312.00752), state conv (B, K - 1, Di) and h (B, Di, N); biases are zeros if absent.

    inner_eps : of the norms of FalconMamba on dt, B and C; negative for none.
    """
    batch, width = x.shape
    inner, size = a_log.shape
    rank = dt_weight.shape[1]
    units, mixed = inner // PANEL, rank + 2 * size
    normed, both = np.empty((batch, width), np.float32), np.empty((batch, 2 * inner), np.float32)
    u, delta = np.empty((batch, inner), np.float32), np.empty((batch, inner), np.float32)
    mixes, parts = np.empty((tasks, batch, mixed), np.float32), np.empty((tasks, batch, width), np.float32)
    _rms_norm(x, norm_weight, eps, normed)
    for index in prange(tasks):
        task = np.int64(index)
        first, last = units * task // tasks * PANEL, units * (task + 1) // tasks * PANEL
        product(in_weight, in_scales, normed, 0, width, first, last, both)
        product(in_weight, in_scales, normed, 0, width, inner + first, inner + last, both)
        for b in range(batch):
            for d in range(first, last):
                new = both[b, d] + in_bias[d]
                u[b, d] = _convolve(new, b, conv_weight, conv_bias, conv_in, conv_out, d)
        product(x_weight, x_scales, u, first, last, 0, mixed, mixes[task])
    low, key = np.zeros((batch, rank), np.float32), np.zeros((batch, size), np.float32)
    query = np.zeros((batch, size), np.float32)
    for task in range(tasks):
        for b in range(batch):
            for i in range(rank):
                low[b, i] += mixes[task, b, i]
            for i in range(size):
                key[b, i] += mixes[task, b, rank + i]
                query[b, i] += mixes[task, b, rank + size + i]
    if inner_eps >= 0:
        ones = np.ones(max(rank, size), np.float32)
        _rms_norm(low, ones, inner_eps, low)
        _rms_norm(key, ones, inner_eps, key)
        _rms_norm(query, ones, inner_eps, query)
    for index in prange(tasks):
        task = np.int64(index)
        first, last = units * task // tasks * PANEL, units * (task + 1) // tasks * PANEL
        product(dt_weight, dt_scales, low, 0, rank, first, last, delta)
        for b in range(batch):
            keys, queries = key[b], query[b]
            for d in range(first, last):
                step, rates = softplus(delta[b, d] + dt_bias[d]), a_log[d]
                push, before, after, total = step * u[b, d], h_in[b, d], h_out[b, d], ZERO
                for n in range(size):
                    value = exp(-step * exp(rates[n])) * before[n] + push * keys[n]
                    after[n] = value
                    total += value * queries[n]
                gate = silu(both[b, inner + d] + in_bias[inner + d])
                u[b, d] = (total + skip[d] * u[b, d]) * gate
        product(out_weight, out_scales, u, first, last, 0, width, parts[task])
    for b in range(batch):
        row = x[b]
        for i in range(width):
            row[i] += out_bias[i]
        for task in range(tasks):
            part = parts[task, b]
            for i in range(width):
                row[i] += part[i]


def mamba2_step_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max,
    a_log, skip, groups, gating, gate_weight, gate_eps, out_weight, out_scales, out_bias, tasks,
    conv_in, h_in, conv_out, h_out,
):  # fmt: skip
    """NumPy twin of :func:`mamba2_step`."""
    batch, heads, headdim, size = h_in.shape
    inner, channels = heads * headdim, conv_weight.shape[0]
    normed = _rms_norm_numpy(x, norm_weight, eps)
    projected = _product_numpy(normed, in_weight, in_scales, inner + channels + heads) + in_bias
    z, new, raw = np.split(projected, [inner, inner + channels], axis=1)
    u = _convolve_numpy(new, conv_weight, conv_bias, conv_in, conv_out)
    xs = u[:, :inner].reshape(batch, heads, headdim, 1)
    key, query = (
        np.repeat(part.reshape(batch, groups, 1, size), heads // groups, axis=1)
        for part in np.split(u[:, inner:], 2, axis=1)
    )
    step = np.clip(np.logaddexp(0, raw + dt_bias).astype(np.float32), dt_min, dt_max)[:, :, None, None]
    h = np.exp(-step * np.exp(a_log)[:, None, None]) * h_in + step * xs * key
    h_out[...] = h
    y = ((h * query).sum(axis=3) + skip * xs[..., 0]).reshape(batch, groups, -1)
    gate, weight = _silu_numpy(z).reshape(y.shape), gate_weight.reshape(groups, -1)
    if gating == GATE_ONLY:
        y = y * gate
    elif gating == GATE_THEN_NORM:
        y = _rms_norm_numpy(y * gate, weight, gate_eps)
    else:
        y = _rms_norm_numpy(y, weight, gate_eps) * gate
    x += _product_numpy(y.reshape(batch, inner), out_weight, out_scales, x.shape[1]) + out_bias


@kernel(twin=mamba2_step_numpy, parallel=True, fastmath=REDUCE)
def mamba2_step(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max,
    a_log, skip, groups, gating, gate_weight, gate_eps, out_weight, out_scales, out_bias, tasks,
    conv_in, h_in, conv_out, h_out,
):  # fmt: skip
    """Mamba-2 (arXiv 2405.21060), state conv (B, K - 1, Di + 2 G N) and h (B, H, P, N).

    skip (H, P) or (H, 1); gating is one of GATE_ONLY, GATE_THEN_NORM, NORM_THEN_GATE.  A norm's divisor is
    common to its group, so it is applied to the finished products.  tasks is a multiple of groups and
    divides the heads; each task has a multiple of 32 channels.
    """
    batch, width = x.shape
    heads, headdim, size = h_in.shape[1:]
    inner, channels = heads * headdim, conv_weight.shape[0]
    rows, per_task = inner + channels + heads, heads // tasks
    panels = (rows + PANEL - 1) // PANEL
    low_dt, high_dt = np.float32(dt_min), np.float32(dt_max)
    normed, projected = np.empty((batch, width), np.float32), np.empty((batch, rows), np.float32)
    u, steps = np.empty((batch, channels), np.float32), np.empty((batch, heads), np.float32)
    y, squares = np.empty((batch, inner), np.float32), np.zeros((tasks, batch), np.float32)
    parts = np.empty((tasks, batch, width), np.float32)
    _rms_norm(x, norm_weight, eps, normed)
    for index in prange(tasks):
        task = np.int64(index)
        first = panels * task // tasks * PANEL
        last = min(panels * (task + 1) // tasks * PANEL, rows)
        product(in_weight, in_scales, normed, 0, width, first, last, projected)
        for b in range(batch):
            for r in range(first, min(last, inner)):
                projected[b, r] = silu(projected[b, r] + in_bias[r])
            for r in range(max(first, inner), min(last, inner + channels)):
                new = projected[b, r] + in_bias[r]
                u[b, r - inner] = _convolve(new, b, conv_weight, conv_bias, conv_in, conv_out, r - inner)
            for r in range(max(first, inner + channels), last):
                step = softplus(projected[b, r] + in_bias[r] + dt_bias[r - inner - channels])
                steps[b, r - inner - channels] = min(max(step, low_dt), high_dt)
    for index in prange(tasks):
        task = np.int64(index)
        for b in range(batch):
            total = ZERO
            for h in range(task * per_task, (task + 1) * per_task):
                start = inner + h // (heads // groups) * size
                key, query = u[b, start : start + size], u[b, start + groups * size : start + (groups + 1) * size]
                keep = exp(-steps[b, h] * exp(a_log[h]))
                for p in range(headdim):
                    at = h * headdim + p
                    before, after = h_in[b, h, p], h_out[b, h, p]
                    push, inside = steps[b, h] * u[b, at], ZERO
                    for n in range(size):
                        value = keep * before[n] + push * key[n]
                        after[n] = value
                        inside += value * query[n]
                    inside += skip[h, p % skip.shape[1]] * u[b, at]
                    gated = inside * projected[b, at]
                    if gating == NORM_THEN_GATE:
                        total += inside * inside
                    else:
                        total += gated * gated
                    y[b, at] = gated * gate_weight[at]
            squares[task, b] = total
        first, last = task * per_task * headdim, (task + 1) * per_task * headdim
        product(out_weight, out_scales, y, first, last, 0, width, parts[task])
    per_group = tasks // groups
    for b in range(batch):
        row = x[b]
        for i in range(width):
            row[i] += out_bias[i]
        for g in range(groups):
            total, scale = ZERO, np.float32(1)
            for task in range(g * per_group, (g + 1) * per_group):
                total += squares[task, b]
            if gating != GATE_ONLY:
                scale /= np.sqrt(total / np.float32(inner // groups) + np.float32(gate_eps))
            for task in range(g * per_group, (g + 1) * per_group):
                part = parts[task, b]
                for i in range(width):
                    row[i] += part[i] * scale
