"""One token through one residual layer, x + mixer(norm(x)): a kernel up to the state and one from there on.

At one token a layer is its weights: each is read once (:mod:`xuracore.kernels.gemv`), and what lies
between the products is done where their results are.  The second product of a kernel takes columns, not
rows: task i multiplies the channels it has just made with their columns, and whoever reads the result forms
the sum over tasks, in order, so that no thread waits for another in between.

x (B, D) float32.  Matrices are pairs (weight, scales) as in gemv; the scan has its channels in multiples of
32.  The states after the token go to ``conv_out`` and ``h_out``, which may be ``conv_in`` and ``h_in``
themselves.  The number of tasks does not depend on the number of threads, so the results do not either.
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
def _sum_of_tasks(parts):
    """(B, …): the sum over the first axis of parts (tasks, B, …), in order."""
    out = parts[0].copy()
    for task in range(1, parts.shape[0]):
        for b in range(out.shape[0]):
            row, part = out[b], parts[task, b]
            for i in range(row.size):
                row[i] += part[i]
    return out


@device
def _norm_pieces(x, first, second, eps):
    """RMS norms without weights of x[:, :first], x[:, first:second] and x[:, second:]."""
    out = x.copy()
    for b in range(x.shape[0]):
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
def _convolve(new, row, weight, bias, before, after, first, last, out):
    """out[first:last] = silu of those channels of the causal convolution; the past moves on by ``new[first:last]``.

    One loop a term: each is vector code, and the channels of a task stay in the cache.
    """
    past = weight.shape[1] - 1
    for d in range(first, last):
        out[d] = bias[d] + weight[d, past] * new[d]
    for k in range(past):
        then = before[row, k]
        for d in range(first, last):
            out[d] += weight[d, k] * then[d]
    for k in range(past):
        then, source = after[row, k], before[row, k + 1] if k + 1 < past else new
        for d in range(first, last):
            then[d] = source[d]
    for d in range(first, last):
        out[d] = silu(out[d])


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


def mamba1_project_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, x_weight, x_scales, conv_in,
    conv_out, gate, u, mixes,
):  # fmt: skip
    inner = u.shape[1]
    both = _product_numpy(_rms_norm_numpy(x, norm_weight, eps), in_weight, in_scales, 2 * inner) + in_bias
    u[...] = _convolve_numpy(both[:, :inner], conv_weight, conv_bias, conv_in, conv_out)
    gate[...] = _silu_numpy(both[:, inner:])
    mixes[...] = 0
    mixes[0] = _product_numpy(u, x_weight, x_scales, mixes.shape[2])


@kernel(twin=mamba1_project_numpy, parallel=True, fastmath=REDUCE)
def mamba1_project(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, x_weight, x_scales, conv_in,
    conv_out, gate, u, mixes,
):  # fmt: skip
    """Mamba-1 (arXiv 2312.00752) up to its state: gate and u (B, Di), and x_proj(u) as mixes (tasks, B, R + 2 N).

    conv_in, conv_out : (B, K - 1, Di).   Biases are zeros if absent.   Only the sum of mixes over tasks has a
    meaning; the twin has it in the first.
    """
    (batch, inner), (tasks, _, mixed) = u.shape, mixes.shape
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
            _convolve(row, b, conv_weight, conv_bias, conv_in, conv_out, first, last, u[b])
        product(x_weight, x_scales, u, first, last, 0, mixed, mixes[task])


def mamba1_scan_numpy(
    mixes, inner_eps, dt_weight, dt_scales, dt_bias, a_log, skip, out_weight, out_scales, gate, u, h_in, h_out, parts
):
    (inner, size), rank = a_log.shape, dt_weight.shape[1]
    low, b, c = np.split(mixes.sum(axis=0), [rank, rank + size], axis=1)
    if inner_eps >= 0:
        low, b, c = (_rms_norm_numpy(each, 1, inner_eps) for each in (low, b, c))
    step = np.logaddexp(0, _product_numpy(low, dt_weight, dt_scales, inner) + dt_bias).astype(np.float32)
    h = np.exp(-step[:, :, None] * np.exp(a_log)) * h_in + (step * u)[:, :, None] * b[:, None]
    h_out[...] = h
    u[...] = (np.einsum("bdn,bn->bd", h, c) + skip * u) * gate
    parts[...] = 0
    parts[0] = _product_numpy(u, out_weight, out_scales, parts.shape[2])


@kernel(twin=mamba1_scan_numpy, parallel=True, fastmath=REDUCE)
def mamba1_scan(
    mixes, inner_eps, dt_weight, dt_scales, dt_bias, a_log, skip, out_weight, out_scales, gate, u, h_in, h_out, parts
):
    """Mamba-1 from there on: h (B, Di, N) after the token, and out_proj of the gated output as parts (tasks, B, D).

    u becomes the gated output.   inner_eps : of the norms of FalconMamba on dt, B and C; negative for none.
    """
    (batch, inner), (tasks, _, width), rank, size = u.shape, parts.shape, dt_weight.shape[1], a_log.shape[1]
    units = inner // PANEL
    mix = _sum_of_tasks(mixes)
    mix = _norm_pieces(mix, rank, rank + size, inner_eps) if inner_eps >= 0 else mix
    delta = np.empty((batch, inner), np.float32)
    for index in prange(tasks):
        task = np.int64(index)
        first, last = units * task // tasks * PANEL, units * (task + 1) // tasks * PANEL
        product(dt_weight, dt_scales, mix, 0, rank, first, last, delta)
        rates = a_log[first:last].reshape(-1)
        keep = np.empty(rates.size, np.float32)
        for b in range(batch):
            keys, queries, steps = mix[b, rank : rank + size], mix[b, rank + size :], delta[b]
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
                push, before, after, total = steps[d] * u[b, d], h_in[b, d], h_out[b, d], ZERO
                for n in range(size):
                    value = row[n] * before[n] + push * keys[n]
                    after[n] = value
                    total += value * queries[n]
                u[b, d] = (total + skip[d] * u[b, d]) * gate[b, d]
        product(out_weight, out_scales, u, first, last, 0, width, parts[task])


def mamba2_project_numpy(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max, conv_in,
    conv_out, gate, u, steps, tasks,
):  # fmt: skip
    inner, channels = gate.shape[1], u.shape[1]
    normed = _rms_norm_numpy(x, norm_weight, eps)
    projected = _product_numpy(normed, in_weight, in_scales, inner + channels + steps.shape[1]) + in_bias
    z, new, raw = np.split(projected, [inner, inner + channels], axis=1)
    gate[...] = _silu_numpy(z)
    u[...] = _convolve_numpy(new, conv_weight, conv_bias, conv_in, conv_out)
    steps[...] = np.clip(np.logaddexp(0, raw + dt_bias), dt_min, dt_max)


@kernel(twin=mamba2_project_numpy, parallel=True, fastmath=REDUCE)
def mamba2_project(
    x, norm_weight, eps, in_weight, in_scales, in_bias, conv_weight, conv_bias, dt_bias, dt_min, dt_max, conv_in,
    conv_out, gate, u, steps, tasks,
):  # fmt: skip
    """Mamba-2 (arXiv 2405.21060) up to its state: gate (B, Di), u (B, Di + 2 G N) and steps (B, H).

    conv_in, conv_out : (B, K - 1, Di + 2 G N).   Biases are zeros if absent.
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
                _convolve(row[inner:], b, conv_weight, conv_bias, conv_in, conv_out, start, stop, u[b])
            for r in range(max(first, inner + channels), last):
                step = softplus(row[r] + dt_bias[r - inner - channels])
                steps[b, r - inner - channels] = min(max(step, low_dt), high_dt)


def mamba2_scan_numpy(
    u, steps, a_log, skip, groups, gating, gate, gate_weight, out_weight, out_scales, h_in, h_out, y, squares, parts
):
    batch, heads, headdim, size = h_in.shape
    inner = heads * headdim
    xs = u[:, :inner].reshape(batch, heads, headdim, 1)
    key, query = (
        np.repeat(part.reshape(batch, groups, 1, size), heads // groups, axis=1)
        for part in np.split(u[:, inner:], 2, axis=1)
    )
    step = steps[:, :, None, None]
    h = np.exp(-step * np.exp(a_log)[:, None, None]) * h_in + step * xs * key
    h_out[...] = h
    inside = ((h * query).sum(axis=3) + skip * xs[..., 0]).reshape(batch, inner)
    y[...] = inside * gate * gate_weight
    counted = inside if gating == NORM_THEN_GATE else inside * gate
    squares[...] = (counted * counted).reshape(batch, len(squares), -1).sum(axis=2).T
    for part, columns in zip(parts, np.split(np.arange(inner), len(parts))):
        part[...] = y[:, columns] @ dequantised(out_weight, out_scales)[: parts.shape[2], columns].T


@kernel(twin=mamba2_scan_numpy, parallel=True, fastmath=REDUCE)
def mamba2_scan(
    u, steps, a_log, skip, groups, gating, gate, gate_weight, out_weight, out_scales, h_in, h_out, y, squares, parts
):
    """Mamba-2 from there on: h (B, H, P, N), the gated output y (B, Di), and out_proj(y) as parts (tasks, B, D).

    skip (H, P) or (H, 1); gating is one of GATE_ONLY, GATE_THEN_NORM, NORM_THEN_GATE.  A norm's divisor is
    common to its group, so it is applied to the finished products, by mamba2_finish: squares (tasks, B) are the
    sums it needs.  There are a multiple of groups tasks, a divisor of the heads; each has a multiple of 32
    channels.
    """
    batch, heads, headdim, size = h_in.shape
    tasks, inner, width = parts.shape[0], heads * headdim, parts.shape[2]
    per_task = heads // tasks
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
                    gated = inside * gate[b, at]
                    if gating == NORM_THEN_GATE:
                        total += inside * inside
                    else:
                        total += gated * gated
                    y[b, at] = gated * gate_weight[at]
            squares[task, b] = total
        first, last = task * per_task * headdim, (task + 1) * per_task * headdim
        product(out_weight, out_scales, y, first, last, 0, width, parts[task])


def finish_numpy(x, bias, parts, squares, groups, count, eps):
    scale = np.float32(1)
    if squares.size:
        sums = squares.reshape(groups, -1, len(x)).sum(axis=1, keepdims=True)
        scale = 1 / np.sqrt(np.repeat(sums, len(parts) // groups, axis=1) / np.float32(count) + np.float32(eps))
        scale = scale.reshape(len(parts), len(x), 1)
    x += bias + (parts * scale).sum(axis=0)


@kernel(twin=finish_numpy, fastmath=REDUCE)
def finish(x, bias, parts, squares, groups, count, eps):
    """x (B, D) += bias (D) + the sum of parts (tasks, B, D), each divided by the norm of its group.

    squares : (tasks, B), of the ``count`` numbers of each group; (0, 0) where there is no norm.
    """
    tasks, batch, width = parts.shape
    per_group = tasks // groups
    for b in range(batch):
        row = x[b]
        for i in range(width):
            row[i] += bias[i]
        for g in range(groups):
            total, scale = ZERO, np.float32(1)
            if squares.size > 0:
                for task in range(g * per_group, (g + 1) * per_group):
                    total += squares[task, b]
                scale /= np.sqrt(total / np.float32(count) + np.float32(eps))
            for task in range(g * per_group, (g + 1) * per_group):
                part = parts[task, b]
                for i in range(width):
                    row[i] += part[i] * scale
