"""The selective scan of Mamba-1 (arXiv 2312.00752, equation 2 with its Euler step for B)::

    delta_t = softplus(raw_t + bias)     (or raw_t + bias as it is; then clipped to [low, high])
    h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + delta_t[d] B_t[n] u_t[d]
    y_t[d] = (sum_n C_t[n] h_t[d, n] + skip[d] u_t[d]) silu(z_t[d])

Backward, with g_t = dL/dh_t and a_t = exp(delta_t A)::

    dy = dout silu(z)          g_t = C_t dy_t + a_{t+1} g_{t+1}          q_t = g_t a_t h_{t-1}
    dC_t = sum_d dy h          dB_t = sum_d g delta u                    dA = sum_t q delta
    du = skip dy + delta sum_n g B                    ddelta = u sum_n g B + sum_n q A

Shapes: u, raw, z ``(T, D)`` (z may have size 0: no gate); A ``(D, N)``; B, C ``(T, G, N)``, channel d
in group ``d // (D / G)``; skip, bias ``(D,)``; the states h ``(S, D, N)``.  The T tokens are those of S
sequences one behind the other: sequence s is ``edges[s] … edges[s + 1]``, and may be empty.

A task walks all of time for up to ``CHANNELS`` channels of one group of one sequence, with the state
as ``(N, channels)``: the exponential and the sums over n then run along contiguous channels.
Every ``block`` tokens of a sequence the forward pass stores the state as ``(N, D)``, from row
``rows[s]`` on; the backward pass recomputes one block at a time.
"""

import math

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import exp2, sigmoid, softplus

ONE_OVER_LN2 = 1 / math.log(2)  # exp(x) = 2**(x / ln 2)
CHANNELS = 128  # of a task: wide enough to hide the loop over n, few enough that small models give several


def tasks(sequences, channels, groups):
    """Number of tasks: ``sequences * groups *`` runs of at most CHANNELS channels in a group."""
    return sequences * groups * runs(channels, groups)


def runs(channels, groups):
    """Runs of at most CHANNELS channels that one group is cut into."""
    return -(-(channels // groups) // CHANNELS)


def _discretise(raw, bias, low, high, soft):
    x = raw + bias
    return np.clip(np.logaddexp(0, x).astype(x.dtype) if soft else x, low, high)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def _to_channels(x, channels):
    """(T, G, N) to (T, D, N)."""
    return np.repeat(x, channels // x.shape[1], axis=1)


def selective_scan_forward_numpy(
    u, raw, a, b, c, skip, z, bias, h_0, edges, rows, low, high, soft, block, y, h_last, saved
):  # fmt: skip
    """NumPy twin of :func:`selective_scan_forward`."""
    delta, channels = _discretise(raw, bias, low, high, soft), u.shape[1]
    bs, cs = _to_channels(b, channels), _to_channels(c, channels)
    for s in range(len(h_0)):
        h = h_0[s].copy()
        for t in range(edges[s], edges[s + 1]):
            if (t - edges[s]) % block == 0:
                saved[rows[s] + (t - edges[s]) // block] = h.T
            step = delta[t, :, None]
            h = np.exp(step * a) * h + step * bs[t] * u[t, :, None]
            y[t] = (cs[t] * h).sum(1) + skip * u[t]
        h_last[s] = h
    if z.size:
        y *= z * _sigmoid(z)


def selective_scan_backward_numpy(
    u, raw, a, b, c, skip, z, bias, edges, rows, low, high, soft, block, saved, gy, gh_last,
    gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """NumPy twin of :func:`selective_scan_backward`."""
    (tokens, channels), (groups, size) = u.shape, b.shape[1:]
    delta = _discretise(raw, bias, low, high, soft)
    bs, cs = _to_channels(b, channels), _to_channels(c, channels)
    gbs, gcs = np.empty_like(bs), np.empty_like(cs)
    ddelta, dy = np.empty_like(u), gy.copy()
    for s in range(len(gh_0)):
        start, stop = edges[s], edges[s + 1]
        states = [saved[rows[s]].T] if stop > start else [np.zeros_like(a)]
        for t in range(start, stop):
            step = delta[t, :, None]
            states.append(np.exp(step * a) * states[-1] + step * bs[t] * u[t, :, None])
            if z.size:
                gate = _sigmoid(z[t])
                gz[t] = gy[t] * ((cs[t] * states[-1]).sum(1) + skip * u[t]) * gate * (1 + z[t] * (1 - gate))
                dy[t] = gy[t] * z[t] * gate
        g, total = gh_last[s], np.zeros_like(a)
        for t in range(stop - 1, start - 1, -1):
            step, before = delta[t, :, None], states[t - start]
            keep = np.exp(step * a)
            g = g + cs[t] * dy[t, :, None]
            gcs[t] = dy[t, :, None] * states[t - start + 1]
            gbs[t] = g * step * u[t, :, None]
            along, q = (g * bs[t]).sum(1), g * keep * before
            gu[t] = skip * dy[t] + delta[t] * along
            ddelta[t] = u[t] * along + (q * a).sum(1)
            total += q * step
            g = g * keep
        gh_0[s], ga[s] = g, total.T
    ddelta[(delta <= low) | (delta >= high)] = 0
    graw[...] = ddelta * _sigmoid(raw + bias) if soft else ddelta
    for s in range(len(gh_0)):
        span = slice(edges[s], edges[s + 1])
        gbias[s], gskip[s] = graw[span].sum(0), (dy[span] * u[span]).sum(0)
    for out, each in ((gb, gbs), (gc, gcs)):
        by_group = each.reshape(tokens, groups, channels // groups, size)
        for run in range(len(gb)):
            out[run] = by_group[:, :, run * CHANNELS : (run + 1) * CHANNELS].sum(2)


@kernel(twin=selective_scan_forward_numpy, fastmath=REDUCE)
def selective_scan_forward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, edges, rows, low, high, soft, block, y, h_last, saved
):  # fmt: skip
    """Scan T tokens; writes y, h_last and saved ``(stored states, N, D)``.  :func:`tasks` tasks."""
    channels = u.shape[1]
    groups, size = b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated, to_binary = z.size > 0, u.dtype.type(ONE_OVER_LN2)
    state, rate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    step, push = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    out = np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        last = first + width  # slices, for an index ``first + w`` may be negative to the compiler: no vector code
        shift, through = bias[first:last], skip[first:last]
        for n in range(size):
            for w in range(width):
                state[n, w] = h_0[s, first + w, n]
                rate[n, w] = a[first + w, n] * to_binary
        opening = edges[s]
        for t in range(opening, edges[s + 1]):
            if (t - opening) % block == 0:
                row = rows[s] + (t - opening) // block
                for n in range(size):
                    kept = saved[row, n, first:last]
                    for w in range(width):
                        kept[w] = state[n, w]
            drive, ticks, made = u[t, first:last], raw[t, first:last], y[t, first:last]
            for w in range(width):
                x = ticks[w] + shift[w]
                x = softplus(x) if soft else x
                x = low if x < low else x
                x = high if x > high else x
                step[w] = x
                push[w] = x * drive[w]
                out[w] = through[w] * drive[w]
            for n in range(size):
                enter, leave, now, speed = b[t, g, n], c[t, g, n], state[n], rate[n]
                for w in range(width):
                    h = exp2(step[w] * speed[w]) * now[w] + enter * push[w]
                    now[w] = h
                    out[w] += leave * h
            if gated:
                gate = z[t, first:last]
                for w in range(width):
                    made[w] = out[w] * (gate[w] * sigmoid(gate[w]))
            else:
                for w in range(width):
                    made[w] = out[w]
        for n in range(size):
            for w in range(width):
                h_last[s, first + w, n] = state[n, w]


@kernel(twin=selective_scan_backward_numpy, fastmath=REDUCE)
def selective_scan_backward(
    start, stop, u, raw, a, b, c, skip, z, bias, edges, rows, low, high, soft, block, saved, gy, gh_last,
    gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """Gradients of :func:`selective_scan_forward`; writes everything from ``gu`` on.

    Partial sums for the caller to add over their first axis: ga ``(S, N, D)`` (note the order),
    gskip, gbias ``(S, D)``, and gb, gc ``(runs, T, G, N)``, one for each run of channels.
    """
    channels = u.shape[1]
    groups, size = b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated, to_binary = z.size > 0, u.dtype.type(ONE_OVER_LN2)
    zero, one = u.dtype.type(0), u.dtype.type(1)
    state, rate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    grad, drate = np.empty((size, CHANNELS), u.dtype), np.empty((size, CHANNELS), u.dtype)
    keeps, kepts = np.empty((block, size, CHANNELS), u.dtype), np.empty((block, size, CHANNELS), u.dtype)
    steps, inner = np.empty((block, CHANNELS), u.dtype), np.empty((block, CHANNELS), u.dtype)
    push, dy = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    dstep, dpush = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        last = first + width
        shift, through, to_shift, to_through = (
            bias[first:last], skip[first:last], gbias[s, first:last], gskip[s, first:last]
        )  # fmt: skip
        for n in range(size):
            for w in range(width):
                grad[n, w] = gh_last[s, first + w, n]
                rate[n, w] = a[first + w, n]
                drate[n, w] = zero
        for w in range(width):
            to_through[w] = zero
            to_shift[w] = zero
        blocks = (edges[s + 1] - edges[s] + block - 1) // block
        for done in range(blocks):
            index = blocks - 1 - done
            opening = edges[s] + index * block
            closing = min(opening + block, edges[s + 1])
            for n in range(size):
                kept = saved[rows[s] + index, n, first:last]
                for w in range(width):
                    state[n, w] = kept[w]
            for t in range(opening, closing):
                o = t - opening
                drive, ticks, step, total = u[t, first:last], raw[t, first:last], steps[o], inner[o]
                for w in range(width):
                    x = ticks[w] + shift[w]
                    x = softplus(x) if soft else x
                    x = low if x < low else x
                    x = high if x > high else x
                    step[w] = x
                    push[w] = x * drive[w]
                    total[w] = through[w] * drive[w]
                for n in range(size):
                    enter, leave, now, speed = b[t, g, n], c[t, g, n], state[n], rate[n]
                    keep, kept = keeps[o, n], kepts[o, n]
                    for w in range(width):
                        stay = exp2(step[w] * (speed[w] * to_binary))
                        old = stay * now[w]
                        keep[w] = stay
                        kept[w] = old
                        h = old + enter * push[w]
                        now[w] = h
                        total[w] += leave * h
            for back in range(closing - opening):
                t = closing - 1 - back
                o = t - opening
                drive, ticks, step, total = u[t, first:last], raw[t, first:last], steps[o], inner[o]
                above, to_drive, to_ticks = gy[t, first:last], gu[t, first:last], graw[t, first:last]
                if gated:
                    gates, to_gates = z[t, first:last], gz[t, first:last]
                    for w in range(width):
                        x, out = gates[w], above[w]
                        gate = sigmoid(x)
                        to_gates[w] = out * total[w] * gate * (one + x * (one - gate))
                        dy[w] = out * x * gate
                else:
                    for w in range(width):
                        dy[w] = above[w]
                for w in range(width):
                    to_through[w] += dy[w] * drive[w]
                    push[w] = step[w] * drive[w]
                    dstep[w] = zero
                    dpush[w] = zero
                for n in range(size):
                    enter, leave, now, speed = b[t, g, n], c[t, g, n], grad[n], rate[n]
                    keep, kept, to_speed = keeps[o, n], kepts[o, n], drate[n]
                    denter, dleave = zero, zero
                    for w in range(width):
                        x = now[w] + leave * dy[w]
                        dleave += dy[w] * (kept[w] + enter * push[w])
                        denter += x * push[w]
                        dpush[w] += x * enter
                        q = x * kept[w]
                        dstep[w] += q * speed[w]
                        to_speed[w] += q * step[w]
                        now[w] = x * keep[w]
                    gb[cut, t, g, n] = denter
                    gc[cut, t, g, n] = dleave
                for w in range(width):
                    to_drive[w] = through[w] * dy[w] + dpush[w] * step[w]
                    x = dstep[w] + dpush[w] * drive[w]
                    x = x * sigmoid(ticks[w] + shift[w]) if soft else x
                    outside = step[w] <= low or step[w] >= high
                    x = zero if outside else x
                    to_ticks[w] = x
                    to_shift[w] += x
        for n in range(size):
            for w in range(width):
                ga[s, n, first + w] = drate[n, w]
                gh_0[s, first + w, n] = grad[n, w]
