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

A task walks through time for up to ``CHANNELS`` channels of one group of one sequence, with the state
as ``(N, channels)``: the exponential and the sums over n then run along contiguous channels.
Before every block of ``block`` tokens but a sequence's first the forward pass stores the state in N rows of
``saved (rows, D)``, for block i of sequence s from row ``places[s] + (i - 1) stride`` on.  The backward pass
recomputes one block at a time, and may be called for some blocks of each sequence, the last ones first: where
it stops it puts g into the rows of the state that it started from.  So ``saved`` may be ``gu`` itself, with the
rows just before each block: they are read before the gradients of their tokens are written.
"""

import math

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import exp2, sigmoid, softplus

ONE_OVER_LN2 = 1 / math.log(2)  # exp(x) = 2**(x / ln 2)
# Rows of the scratch arrays.  In one array the compiler sees that rows do not overlap; between two it would test
# that before every short loop, at a cost comparable with the loop.
STATE, RATE, GRAD, DRATE = range(4)  # of each n
STEP, PUSH, OUT, DSTEP, DPUSH = range(5)  # of the token at hand; OUT is y, or dy in the backward pass
KEEP, KEPT = range(2)  # of each token of a block and each n: a_t, a_t h_{t-1}; of each token STEP and:
TOTAL = 1  # y before the gate
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


def stored(saved, place, block, stride, size):
    """The rows of ``saved`` with the state before a sequence's block ``block``, at least 1."""
    row = place + (block - 1) * stride
    return saved[row : row + size]


def stretches(edges, block, begin, end):
    """(sequence, first token, end, blocks up to there, whether its last is among them) of the blocks begin … end."""
    for s in range(len(edges) - 1):
        blocks = -(-(edges[s + 1] - edges[s]) // block)
        upper = min(end, blocks)
        if not begin or upper > begin:
            closing = min(edges[s] + upper * block, edges[s + 1])
            yield s, edges[s] + begin * block, closing, upper, upper == blocks


def _to_channels(x, channels):
    """(T, G, N) to (T, D, N)."""
    return np.repeat(x, channels // x.shape[1], axis=1)


def selective_scan_forward_numpy(
    u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, y, h_last
):  # fmt: skip
    """NumPy twin of :func:`selective_scan_forward`."""
    delta, channels = _discretise(raw, bias, low, high, soft), u.shape[1]
    bs, cs = _to_channels(b, channels), _to_channels(c, channels)
    for s in range(len(h_last)):
        h = h_0[s] if h_0.size else np.zeros_like(a)
        for t in range(edges[s], edges[s + 1]):
            i = (t - edges[s]) // block
            if i and (t - edges[s]) % block == 0:
                stored(saved, places[s], i, stride, h.shape[1])[...] = h.T
            step = delta[t, :, None]
            h = np.exp(step * a) * h + step * bs[t] * u[t, :, None]
            y[t] = (cs[t] * h).sum(1) + skip * u[t]
        h_last[s] = h
    if z.size:
        y *= z * _sigmoid(z)


def selective_scan_backward_numpy(
    u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, gy, gh_last,
    begin, end, rows, gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """NumPy twin of :func:`selective_scan_backward`."""
    (channels, size), groups = a.shape, b.shape[1]
    for s, opening, closing, upper, last in stretches(edges, block, begin, end):
        here = slice(opening, closing)
        us, delta = u[here], _discretise(raw[here], bias, low, high, soft)
        bs, cs = _to_channels(b[here], channels), _to_channels(c[here], channels)
        gbs, gcs = np.empty_like(bs), np.empty_like(cs)
        ddelta, dy = np.empty_like(us), gy[here].copy()
        first = h_0[s] if h_0.size else np.zeros_like(a)
        states = [stored(saved, places[s], begin, stride, size).T.copy() if begin else first]
        for t, step in enumerate(delta[:, :, None]):
            states.append(np.exp(step * a) * states[-1] + step * bs[t] * us[t, :, None])
            if z.size:
                x, gate = z[opening + t], _sigmoid(z[opening + t])
                gz[opening + t] = dy[t] * ((cs[t] * states[-1]).sum(1) + skip * us[t]) * gate * (1 + x * (1 - gate))
                dy[t] *= x * gate
        if not last:
            g = stored(saved, places[s], upper, stride, size).T.copy()
        else:
            g = gh_last[s] if gh_last.size else np.zeros_like(a)
        for t in range(closing - opening - 1, -1, -1):
            step, before = delta[t, :, None], states[t]
            keep = np.exp(step * a)
            g = g + cs[t] * dy[t, :, None]
            gcs[t] = dy[t, :, None] * states[t + 1]
            gbs[t] = g * step * us[t, :, None]
            along, q = (g * bs[t]).sum(1), g * keep * before
            gu[opening + t] = skip * dy[t] + delta[t] * along
            ddelta[t] = us[t] * along + (q * a).sum(1)
            ga[s] += (q * step).T
            g = g * keep
        if begin:
            stored(saved, places[s], begin, stride, size)[...] = g.T
        elif gh_0.size:
            gh_0[s] = g
        ddelta[(delta <= low) | (delta >= high)] = 0
        graw[here] = ddelta * _sigmoid(raw[here] + bias) if soft else ddelta
        gbias[s] += graw[here].sum(0)
        gskip[s] += (dy * us).sum(0)
        for out, each in ((gb, gbs), (gc, gcs)):
            by_group = each.reshape(closing - opening, groups, channels // groups, size)
            for run in range(len(gb)):
                cut = by_group[:, :, run * CHANNELS : (run + 1) * CHANNELS]
                out[run, rows[s] : rows[s] + closing - opening] = cut.sum(2)


@kernel(twin=selective_scan_forward_numpy, fastmath=REDUCE)
def selective_scan_forward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, y, h_last
):  # fmt: skip
    """Scan T tokens from h_0, or from zero where it has size 0; writes saved, y and h_last.  :func:`tasks` tasks."""
    channels, groups, size = u.shape[1], b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated, started, zero, to_binary = z.size > 0, h_0.size > 0, u.dtype.type(0), u.dtype.type(ONE_OVER_LN2)
    own, now = np.empty((size, 2, CHANNELS), u.dtype), np.empty((3, CHANNELS), u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        last = first + width  # slices, for an index ``first + w`` may be negative to the compiler: no vector code
        shift, through = bias[first:last], skip[first:last]
        for n in range(size):
            for w in range(width):
                own[n, STATE, w] = h_0[s, first + w, n] if started else zero
                own[n, RATE, w] = a[first + w, n] * to_binary
        opening = edges[s]
        for t in range(opening, edges[s + 1]):
            if t > opening and (t - opening) % block == 0:
                row = places[s] + ((t - opening) // block - 1) * stride
                for n in range(size):
                    kept = saved[row + n, first:last]
                    for w in range(width):
                        kept[w] = own[n, STATE, w]
            drive, ticks, made = u[t, first:last], raw[t, first:last], y[t, first:last]
            for w in range(width):
                x = ticks[w] + shift[w]
                x = softplus(x) if soft else x
                x = low if x < low else x
                x = high if x > high else x
                now[STEP, w] = x
                now[PUSH, w] = x * drive[w]
                now[OUT, w] = through[w] * drive[w]
            for n in range(size):
                enter, leave, mine = b[t, g, n], c[t, g, n], own[n]
                for w in range(width):
                    h = exp2(now[STEP, w] * mine[RATE, w]) * mine[STATE, w] + enter * now[PUSH, w]
                    mine[STATE, w] = h
                    now[OUT, w] += leave * h
            if gated:
                gate = z[t, first:last]
                for w in range(width):
                    made[w] = now[OUT, w] * (gate[w] * sigmoid(gate[w]))
            else:
                for w in range(width):
                    made[w] = now[OUT, w]
        for n in range(size):
            for w in range(width):
                h_last[s, first + w, n] = own[n, STATE, w]


@kernel(twin=selective_scan_backward_numpy, fastmath=REDUCE)
def selective_scan_backward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, gy, gh_last,
    begin, end, rows, gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """Gradients of :func:`selective_scan_forward` from the blocks ``begin … end`` (excluded) of each sequence.

    Calls go from the last blocks to the first.  Writes gu, graw, gz, and with the first block gh_0; adds to
    ga ``(S, N, D)`` (note the order), gskip and gbias ``(S, D)``.  Sums over each run of channels go to gb and gc
    ``(runs, rows, G, N)``, those of the first token of sequence s here to row ``rows[s]``.  gh_last and gh_0
    may have size 0: no gradient comes from the last state, none is wanted for the first.
    """
    channels, groups, size = u.shape[1], b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    gated, started, ended, to_binary = z.size > 0, h_0.size > 0, gh_last.size > 0, u.dtype.type(ONE_OVER_LN2)
    zero, one = u.dtype.type(0), u.dtype.type(1)
    own, now = np.empty((size, 4, CHANNELS), u.dtype), np.empty((5, CHANNELS), u.dtype)
    past, tokens = np.empty((block, size, 2, CHANNELS), u.dtype), np.empty((block, 2, CHANNELS), u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        last = first + width
        shift, through, to_shift, to_through = (
            bias[first:last], skip[first:last], gbias[s, first:last], gskip[s, first:last]
        )  # fmt: skip
        blocks = (edges[s + 1] - edges[s] + block - 1) // block
        upper = min(end, blocks)
        if begin > 0 and upper <= begin:
            continue
        row, place = rows[s] - edges[s] - begin * block, places[s] - stride
        for n in range(size):
            to_speed = ga[s, n, first:last]
            for w in range(width):
                own[n, RATE, w] = a[first + w, n]
                own[n, DRATE, w] = to_speed[w]
                own[n, GRAD, w] = gh_last[s, first + w, n] if ended and upper == blocks else zero
            if upper < blocks:
                kept = saved[place + upper * stride + n, first:last]
                for w in range(width):
                    own[n, GRAD, w] = kept[w]
        for done in range(upper - begin):
            index = upper - 1 - done
            opening = edges[s] + index * block
            closing = min(opening + block, edges[s + 1])
            for n in range(size):
                if index > 0:
                    kept = saved[place + index * stride + n, first:last]
                    for w in range(width):
                        own[n, STATE, w] = kept[w]
                else:
                    for w in range(width):
                        own[n, STATE, w] = h_0[s, first + w, n] if started else zero
            for t in range(opening, closing):
                drive, ticks, token = u[t, first:last], raw[t, first:last], tokens[t - opening]
                for w in range(width):
                    x = ticks[w] + shift[w]
                    x = softplus(x) if soft else x
                    x = low if x < low else x
                    x = high if x > high else x
                    token[STEP, w] = x
                    now[STEP, w] = x
                    now[PUSH, w] = x * drive[w]
                    now[OUT, w] = through[w] * drive[w]
                for n in range(size):
                    enter, leave, mine, before = b[t, g, n], c[t, g, n], own[n], past[t - opening, n]
                    for w in range(width):
                        stay = exp2(now[STEP, w] * (mine[RATE, w] * to_binary))
                        x = stay * mine[STATE, w]
                        before[KEEP, w], before[KEPT, w] = stay, x
                        h = x + enter * now[PUSH, w]
                        mine[STATE, w] = h
                        now[OUT, w] += leave * h
                for w in range(width):
                    token[TOTAL, w] = now[OUT, w]
            for back in range(closing - opening):
                t = closing - 1 - back
                drive, ticks, token = u[t, first:last], raw[t, first:last], tokens[t - opening]
                above, to_drive, to_ticks = gy[t, first:last], gu[t, first:last], graw[t, first:last]
                if gated:
                    gates, to_gates = z[t, first:last], gz[t, first:last]
                    for w in range(width):
                        x, out = gates[w], above[w]
                        gate = sigmoid(x)
                        to_gates[w] = out * token[TOTAL, w] * gate * (one + x * (one - gate))
                        now[OUT, w] = out * x * gate
                else:
                    for w in range(width):
                        now[OUT, w] = above[w]
                for w in range(width):
                    to_through[w] += now[OUT, w] * drive[w]
                    now[STEP, w] = token[STEP, w]
                    now[PUSH, w] = now[STEP, w] * drive[w]
                    now[DSTEP, w] = zero
                    now[DPUSH, w] = zero
                for n in range(size):
                    enter, leave, mine, before = b[t, g, n], c[t, g, n], own[n], past[t - opening, n]
                    denter, dleave = zero, zero
                    for w in range(width):
                        x = mine[GRAD, w] + leave * now[OUT, w]
                        dleave += now[OUT, w] * (before[KEPT, w] + enter * now[PUSH, w])
                        denter += x * now[PUSH, w]
                        now[DPUSH, w] += x * enter
                        q = x * before[KEPT, w]
                        now[DSTEP, w] += q * mine[RATE, w]
                        mine[DRATE, w] += q * now[STEP, w]
                        mine[GRAD, w] = x * before[KEEP, w]
                    gb[cut, row + t, g, n] = denter
                    gc[cut, row + t, g, n] = dleave
                for w in range(width):
                    to_drive[w] = through[w] * now[OUT, w] + now[DPUSH, w] * now[STEP, w]
                    x = now[DSTEP, w] + now[DPUSH, w] * drive[w]
                    x = x * sigmoid(ticks[w] + shift[w]) if soft else x
                    outside = now[STEP, w] <= low or now[STEP, w] >= high
                    x = zero if outside else x
                    to_ticks[w] = x
                    to_shift[w] += x
        for n in range(size):
            to_speed = ga[s, n, first:last]
            for w in range(width):
                to_speed[w] = own[n, DRATE, w]
            if begin > 0:
                kept = saved[place + begin * stride + n, first:last]
                for w in range(width):
                    kept[w] = own[n, GRAD, w]
            elif gh_0.size > 0:
                for w in range(width):
                    gh_0[s, first + w, n] = own[n, GRAD, w]
