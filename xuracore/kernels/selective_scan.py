"""The selective scan of Mamba-1 (arXiv 2312.00752, equation 2 with its Euler step for B)::

    delta_t = softplus(raw_t + bias)                         (or raw_t + bias as it is)
    h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] B_t[n] u_t[d]
    y_t[d] = (sum_n C_t[n] h_t[d, n] + skip[d] u_t[d]) silu(z_t[d])

Backward, with g_t = dL/dh_t and a_t = exp(delta_t A)::

    dy = dout silu(z)          g_t = C_t dy_t + a_{t+1} g_{t+1}          q_t = g_t a_t h_{t-1}
    dC_t = sum_d dy h          dB_t = sum_d g delta u                    dA = sum_t q delta
    du = skip dy + delta sum_n g B                    ddelta = u sum_n g B + sum_n q A

Shapes: u, raw, z ``(B, L, D)`` (z may have size 0: no gate); A ``(D, N)``; B, C ``(B, L, G, N)``,
channel d in group ``d // (D / G)``; skip, bias ``(D,)``; the state h ``(B, D, N)``.

A task walks all of time for up to ``CHANNELS`` channels of one group of one sequence, with the state
as ``(N, channels)``: the exponential and the sums over n then run along contiguous channels.
Every ``block`` tokens the forward pass stores the state as ``(N, D)``; the backward pass recomputes
one block at a time.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import exp, sigmoid, softplus

CHANNELS = 64  # of a task: four AVX-512 vectors, and few enough that small models give several tasks


def tasks(batch, channels, groups):
    """Number of tasks: ``batch * groups *`` runs of at most CHANNELS channels in a group."""
    return batch * groups * runs(channels, groups)


def runs(channels, groups):
    """Runs of at most CHANNELS channels that one group is cut into."""
    return -(-(channels // groups) // CHANNELS)


def _discretise(raw, bias, soft):
    x = raw + bias
    return np.logaddexp(0, x).astype(x.dtype) if soft else x


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def _to_channels(x, channels):
    """(B, L, G, N) to (B, L, D, N)."""
    return np.repeat(x, channels // x.shape[2], axis=2)


def selective_scan_forward_numpy(u, raw, a, b, c, skip, z, bias, h_0, soft, block, y, h_last, saved):
    """NumPy twin of :func:`selective_scan_forward`."""
    delta, channels = _discretise(raw, bias, soft), u.shape[2]
    bs, cs = _to_channels(b, channels), _to_channels(c, channels)
    h = h_0.copy()
    for t in range(u.shape[1]):
        if t % block == 0:
            saved[:, t // block] = h.swapaxes(1, 2)
        step = delta[:, t, :, None]
        h = np.exp(step * a) * h + step * bs[:, t] * u[:, t, :, None]
        y[:, t] = (cs[:, t] * h).sum(2) + skip * u[:, t]
    if z.size:
        y *= z * _sigmoid(z)
    h_last[...] = h


def selective_scan_backward_numpy(
    u, raw, a, b, c, skip, z, bias, soft, block, saved, gy, gh_last,
    gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """NumPy twin of :func:`selective_scan_backward`."""
    batch, length, channels = u.shape
    groups, size = b.shape[2:]
    delta = _discretise(raw, bias, soft)
    bs, cs = _to_channels(b, channels), _to_channels(c, channels)
    states = [saved[:, 0].swapaxes(1, 2)]
    for t in range(length):
        step = delta[:, t, :, None]
        states.append(np.exp(step * a) * states[-1] + step * bs[:, t] * u[:, t, :, None])
    dy = gy
    if z.size:
        gate = _sigmoid(z)
        inner = np.stack([(cs[:, t] * states[t + 1]).sum(2) for t in range(length)], 1) + skip * u
        gz[...] = gy * inner * gate * (1 + z * (1 - gate))
        dy = gy * z * gate
    ddelta, g = np.empty_like(u), gh_last.copy()
    gbs, gcs = np.empty_like(bs), np.empty_like(cs)
    total = np.zeros_like(g)
    for t in reversed(range(length)):
        step = delta[:, t, :, None]
        keep = np.exp(step * a)
        g = g + cs[:, t] * dy[:, t, :, None]
        gcs[:, t] = dy[:, t, :, None] * states[t + 1]
        gbs[:, t] = g * step * u[:, t, :, None]
        along = (g * bs[:, t]).sum(2)
        q = g * keep * states[t]
        gu[:, t] = skip * dy[:, t] + delta[:, t] * along
        ddelta[:, t] = u[:, t] * along + (q * a).sum(2)
        total += q * step
        g = g * keep
    gh_0[...], ga[...] = g, total.swapaxes(1, 2)
    graw[...] = ddelta * _sigmoid(raw + bias) if soft else ddelta
    gbias[...], gskip[...] = graw.sum(1), (dy * u).sum(1)
    count = gb.shape[0]
    for out, each in ((gb, gbs), (gc, gcs)):
        by_group = each.reshape(batch, length, groups, channels // groups, size)
        for run in range(count):
            out[run] = by_group[:, :, :, run * CHANNELS : (run + 1) * CHANNELS].sum(3)


@kernel(twin=selective_scan_forward_numpy, fastmath=REDUCE)
def selective_scan_forward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, soft, block, y, h_last, saved
):  # fmt: skip
    """Scan L tokens; writes y, h_last and saved ``(B, ceil(L / block), N, D)``.  :func:`tasks` tasks."""
    length, channels = u.shape[1], u.shape[2]
    groups, size = b.shape[2], b.shape[3]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated = z.size > 0
    state, rate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    step, push = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    out = np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        for n in range(size):
            for w in range(width):
                state[n, w] = h_0[s, first + w, n]
                rate[n, w] = a[first + w, n]
        for t in range(length):
            if t % block == 0:
                for n in range(size):
                    for w in range(width):
                        saved[s, t // block, n, first + w] = state[n, w]
            for w in range(width):
                x = raw[s, t, first + w] + bias[first + w]
                step[w] = softplus(x) if soft else x
                push[w] = step[w] * u[s, t, first + w]
                out[w] = skip[first + w] * u[s, t, first + w]
            for n in range(size):
                enter, leave = b[s, t, g, n], c[s, t, g, n]
                for w in range(width):
                    h = exp(step[w] * rate[n, w]) * state[n, w] + enter * push[w]
                    state[n, w] = h
                    out[w] += leave * h
            if gated:
                for w in range(width):
                    x = z[s, t, first + w]
                    y[s, t, first + w] = out[w] * (x * sigmoid(x))
            else:
                for w in range(width):
                    y[s, t, first + w] = out[w]
        for n in range(size):
            for w in range(width):
                h_last[s, first + w, n] = state[n, w]


@kernel(twin=selective_scan_backward_numpy, fastmath=REDUCE)
def selective_scan_backward(
    start, stop, u, raw, a, b, c, skip, z, bias, soft, block, saved, gy, gh_last,
    gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """Gradients of :func:`selective_scan_forward`; writes everything from ``gu`` on.

    Partial sums for the caller to add over their first axis: ga ``(B, N, D)`` (note the order),
    gskip, gbias ``(B, D)``, and gb, gc ``(runs, B, L, G, N)``, one for each run of channels.
    """
    length, channels = u.shape[1], u.shape[2]
    groups, size = b.shape[2], b.shape[3]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated = z.size > 0
    zero, one = u.dtype.type(0), u.dtype.type(1)
    state, rate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    grad, drate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    states = np.empty((block, size, CHANNELS), u.dtype)
    steps, inner = np.empty((block, CHANNELS), u.dtype), np.empty((block, CHANNELS), u.dtype)
    push, dy = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    dstep, dpush = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        for n in range(size):
            for w in range(width):
                grad[n, w] = gh_last[s, first + w, n]
                rate[n, w] = a[first + w, n]
                drate[n, w] = zero
        for w in range(width):
            gskip[s, first + w] = zero
            gbias[s, first + w] = zero
        blocks = (length + block - 1) // block
        for done in range(blocks):
            index = blocks - 1 - done
            opening = index * block
            closing = min(opening + block, length)
            for n in range(size):
                for w in range(width):
                    state[n, w] = saved[s, index, n, first + w]
            for t in range(opening, closing):
                o = t - opening
                for w in range(width):
                    x = raw[s, t, first + w] + bias[first + w]
                    steps[o, w] = softplus(x) if soft else x
                    push[w] = steps[o, w] * u[s, t, first + w]
                    inner[o, w] = skip[first + w] * u[s, t, first + w]
                for n in range(size):
                    enter, leave = b[s, t, g, n], c[s, t, g, n]
                    for w in range(width):
                        h = state[n, w]
                        states[o, n, w] = h
                        h = exp(steps[o, w] * rate[n, w]) * h + enter * push[w]
                        state[n, w] = h
                        inner[o, w] += leave * h
            for back in range(closing - opening):
                t = closing - 1 - back
                o = t - opening
                for w in range(width):
                    out = gy[s, t, first + w]
                    if gated:
                        x = z[s, t, first + w]
                        gate = sigmoid(x)
                        gz[s, t, first + w] = out * inner[o, w] * gate * (one + x * (one - gate))
                        out = out * x * gate
                    dy[w] = out
                    gskip[s, first + w] += out * u[s, t, first + w]
                    push[w] = steps[o, w] * u[s, t, first + w]
                    dstep[w] = zero
                    dpush[w] = zero
                for n in range(size):
                    enter, leave = b[s, t, g, n], c[s, t, g, n]
                    denter, dleave = zero, zero
                    for w in range(width):
                        keep, before = exp(steps[o, w] * rate[n, w]), states[o, n, w]
                        kept = keep * before
                        x = grad[n, w] + leave * dy[w]
                        dleave += dy[w] * (kept + enter * push[w])
                        denter += x * push[w]
                        dpush[w] += x * enter
                        q = x * kept
                        dstep[w] += q * rate[n, w]
                        drate[n, w] += q * steps[o, w]
                        grad[n, w] = x * keep
                    gb[cut, s, t, g, n] = denter
                    gc[cut, s, t, g, n] = dleave
                for w in range(width):
                    x = u[s, t, first + w]
                    gu[s, t, first + w] = skip[first + w] * dy[w] + dpush[w] * steps[o, w]
                    total = dstep[w] + dpush[w] * x
                    if soft:
                        total *= sigmoid(raw[s, t, first + w] + bias[first + w])
                    graw[s, t, first + w] = total
                    gbias[s, first + w] += total
        for n in range(size):
            for w in range(width):
                ga[s, n, first + w] = drate[n, w]
                gh_0[s, first + w, n] = grad[n, w]
