"""The selective scan with a complex A (arXiv 2312.00752, section 3.6): the real one, with y = 2 Re sum C h.

Backward, with g = dL/dRe h + i dL/dIm h and a_t = exp(delta_t A)::

    g_t = 2 conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}          q_t = g_t conj(a_t h_{t-1})
    dC_t = 2 sum_d dy conj(h)       dB_t = sum_d g delta u       dA = sum_t q delta
    du = skip dy + delta Re sum_n conj(B) g          ddelta = u Re sum_n conj(B) g + Re sum_n q conj(A)

Arguments, order and tasks as in :mod:`xuracore.kernels.selective_scan`; A ``(D, N, 2)``, B and C
``(T, G, N, 2)``, states ``(S, D, N, 2)`` hold real and imaginary parts; a stored state has 2 N rows, N pairs.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import cosine_sine, exp, sigmoid, softplus
from xuracore.kernels.selective_scan import CHANNELS, _discretise, _sigmoid, _to_channels, stored, stretches


def _complex(x):
    return x[..., 0] + 1j * x[..., 1]


def _parts(z):
    return np.stack([z.real, z.imag], axis=-1)


def _rows(z):
    """(D, N) complex as a stored state, (2 N, D)."""
    return _parts(z).reshape(len(z), -1).T


def _of_rows(rows):
    return _complex(rows.T.reshape(rows.shape[1], -1, 2))


def complex_scan_forward_numpy(
    u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, y, h_last
):  # fmt: skip
    """NumPy twin of :func:`complex_scan_forward`."""
    delta, channels = _discretise(raw, bias, low, high, soft), u.shape[1]
    a, bs, cs = _complex(a), _to_channels(_complex(b), channels), _to_channels(_complex(c), channels)
    for s in range(len(h_last)):
        h = _complex(h_0[s]) if h_0.size else np.zeros_like(a)
        for t in range(edges[s], edges[s + 1]):
            i = (t - edges[s]) // block
            if i and (t - edges[s]) % block == 0:
                stored(saved, places[s], i, stride, 2 * h.shape[1])[...] = _rows(h)
            step = delta[t, :, None]
            h = np.exp(step * a) * h + step * bs[t] * u[t, :, None]
            y[t] = 2 * (cs[t] * h).real.sum(1) + skip * u[t]
        h_last[s] = _parts(h)
    if z.size:
        y *= z * _sigmoid(z)


def complex_scan_backward_numpy(
    u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, gy, gh_last,
    begin, end, rows, gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """NumPy twin of :func:`complex_scan_backward`."""
    (channels, size), groups, a = a.shape[:2], b.shape[1], _complex(a)
    for s, opening, closing, upper, last in stretches(edges, block, begin, end):
        here = slice(opening, closing)
        us, delta = u[here], _discretise(raw[here], bias, low, high, soft)
        bs, cs = (_to_channels(_complex(x[here]), channels) for x in (b, c))
        gbs, gcs = np.empty_like(bs), np.empty_like(cs)
        ddelta, dy = np.empty_like(us), gy[here].copy()
        first = _complex(h_0[s]) if h_0.size else np.zeros_like(a)
        states = [_of_rows(stored(saved, places[s], begin, stride, 2 * size)) if begin else first]
        for t, step in enumerate(delta[:, :, None]):
            states.append(np.exp(step * a) * states[-1] + step * bs[t] * us[t, :, None])
            if z.size:
                x, gate = z[opening + t], _sigmoid(z[opening + t])
                inner = 2 * (cs[t] * states[-1]).real.sum(1) + skip * us[t]
                gz[opening + t] = dy[t] * inner * gate * (1 + x * (1 - gate))
                dy[t] *= x * gate
        if not last:
            g = _of_rows(stored(saved, places[s], upper, stride, 2 * size))
        else:
            g = _complex(gh_last[s]) if gh_last.size else np.zeros_like(a)
        for t in range(closing - opening - 1, -1, -1):
            step = delta[t, :, None]
            keep = np.exp(step * a)
            g = g + 2 * cs[t].conj() * dy[t, :, None]
            gcs[t] = 2 * dy[t, :, None] * states[t + 1].conj()
            gbs[t] = g * step * us[t, :, None]
            along, q = (g * bs[t].conj()).real.sum(1), g * (keep * states[t]).conj()
            gu[opening + t] = skip * dy[t] + delta[t] * along
            ddelta[t] = us[t] * along + (q * a.conj()).real.sum(1)
            ga[s] += _parts(q * step).transpose(1, 2, 0)
            g = g * keep.conj()
        if begin:
            stored(saved, places[s], begin, stride, 2 * size)[...] = _rows(g)
        elif gh_0.size:
            gh_0[s] = _parts(g)
        ddelta[(delta <= low) | (delta >= high)] = 0
        graw[here] = ddelta * _sigmoid(raw[here] + bias) if soft else ddelta
        gbias[s] += graw[here].sum(0)
        gskip[s] += (dy * us).sum(0)
        for out, each in ((gb, gbs), (gc, gcs)):
            by_group = each.reshape(closing - opening, groups, channels // groups, size)
            for run in range(len(gb)):
                cut = by_group[:, :, run * CHANNELS : (run + 1) * CHANNELS]
                out[run, rows[s] : rows[s] + closing - opening] = _parts(cut.sum(2))


@kernel(twin=complex_scan_forward_numpy, fastmath=REDUCE)
def complex_scan_forward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, y, h_last
):  # fmt: skip
    """Scan T tokens; writes saved, y and h_last."""
    channels, groups, size = u.shape[1], b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    zero, two, started = u.dtype.type(0), u.dtype.type(2), h_0.size > 0
    state, rate = np.empty((size, 2, CHANNELS), u.dtype), np.empty((size, 2, CHANNELS), u.dtype)
    step, push, out = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        for n in range(size):
            for part in range(2):
                for w in range(width):
                    state[n, part, w] = h_0[s, first + w, n, part] if started else zero
                    rate[n, part, w] = a[first + w, n, part]
        opening = edges[s]
        for t in range(opening, edges[s + 1]):
            if t > opening and (t - opening) % block == 0:
                row = places[s] + ((t - opening) // block - 1) * stride
                for n in range(size):
                    for part in range(2):
                        for w in range(width):
                            saved[row + 2 * n + part, first + w] = state[n, part, w]
            for w in range(width):
                x = raw[t, first + w] + bias[first + w]
                x = softplus(x) if soft else x
                x = low if x < low else x
                x = high if x > high else x
                step[w] = x
                push[w] = x * u[t, first + w]
                out[w] = skip[first + w] * u[t, first + w]
            for n in range(size):
                b_re, b_im, c_re, c_im = b[t, g, n, 0], b[t, g, n, 1], two * c[t, g, n, 0], two * c[t, g, n, 1]
                for w in range(width):
                    grow = exp(step[w] * rate[n, 0, w])
                    cosine, sine = cosine_sine(step[w] * rate[n, 1, w])
                    k_re, k_im, h_re, h_im = grow * cosine, grow * sine, state[n, 0, w], state[n, 1, w]
                    real = k_re * h_re - k_im * h_im + b_re * push[w]
                    imag = k_re * h_im + k_im * h_re + b_im * push[w]
                    state[n, 0, w], state[n, 1, w] = real, imag
                    out[w] += c_re * real - c_im * imag
            for w in range(width):
                x = z[t, first + w] if z.size > 0 else out[w]
                y[t, first + w] = out[w] * (x * sigmoid(x)) if z.size > 0 else out[w]
        for n in range(size):
            for part in range(2):
                for w in range(width):
                    h_last[s, first + w, n, part] = state[n, part, w]


@kernel(twin=complex_scan_backward_numpy, fastmath=REDUCE)
def complex_scan_backward(
    start, stop, u, raw, a, b, c, skip, z, bias, h_0, edges, low, high, soft, block, places, stride, saved, gy, gh_last,
    begin, end, rows, gu, graw, ga, gb, gc, gskip, gz, gbias, gh_0,
):  # fmt: skip
    """Gradients of :func:`complex_scan_forward`, as in the real scan; ga ``(S, N, 2, D)``."""
    channels, groups, size = u.shape[1], b.shape[1], b.shape[2]
    per_group = channels // groups
    cuts = (per_group + CHANNELS - 1) // CHANNELS
    zero, one, two = u.dtype.type(0), u.dtype.type(1), u.dtype.type(2)
    started, ended, wanted = h_0.size > 0, gh_last.size > 0, gh_0.size > 0
    shape = (size, 2, CHANNELS)
    state, rate, grad = np.empty(shape, u.dtype), np.empty(shape, u.dtype), np.empty(shape, u.dtype)
    drate, keeps = np.empty(shape, u.dtype), np.empty((block, size, 2, CHANNELS), u.dtype)
    befores = np.empty((block, size, 2, CHANNELS), u.dtype)
    steps, inner = np.empty((block, CHANNELS), u.dtype), np.empty((block, CHANNELS), u.dtype)
    push, dy = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    dstep, dpush = np.empty(CHANNELS, u.dtype), np.empty(CHANNELS, u.dtype)
    for task in range(start, stop):
        s, g, cut = task // (groups * cuts), task // cuts % groups, task % cuts
        first = g * per_group + cut * CHANNELS
        width = min(CHANNELS, per_group - cut * CHANNELS)
        blocks = (edges[s + 1] - edges[s] + block - 1) // block
        upper = min(end, blocks)
        if begin > 0 and upper <= begin:
            continue
        row, place = rows[s] - edges[s] - begin * block, places[s] - stride
        for n in range(size):
            for part in range(2):
                for w in range(width):
                    rate[n, part, w] = a[first + w, n, part]
                    drate[n, part, w] = ga[s, n, part, first + w]
                    if upper < blocks:
                        grad[n, part, w] = saved[place + upper * stride + 2 * n + part, first + w]
                    else:
                        grad[n, part, w] = gh_last[s, first + w, n, part] if ended else zero
        for done in range(upper - begin):
            index = upper - 1 - done
            opening = edges[s] + index * block
            closing = min(opening + block, edges[s + 1])
            for n in range(size):
                for part in range(2):
                    for w in range(width):
                        if index > 0:
                            state[n, part, w] = saved[place + index * stride + 2 * n + part, first + w]
                        else:
                            state[n, part, w] = h_0[s, first + w, n, part] if started else zero
            for t in range(opening, closing):
                o = t - opening
                for w in range(width):
                    x = raw[t, first + w] + bias[first + w]
                    x = softplus(x) if soft else x
                    x = low if x < low else x
                    x = high if x > high else x
                    steps[o, w] = x
                    push[w] = x * u[t, first + w]
                    inner[o, w] = skip[first + w] * u[t, first + w]
                for n in range(size):
                    b_re, b_im, c_re, c_im = b[t, g, n, 0], b[t, g, n, 1], two * c[t, g, n, 0], two * c[t, g, n, 1]
                    for w in range(width):
                        grow = exp(steps[o, w] * rate[n, 0, w])
                        cosine, sine = cosine_sine(steps[o, w] * rate[n, 1, w])
                        k_re, k_im, h_re, h_im = grow * cosine, grow * sine, state[n, 0, w], state[n, 1, w]
                        keeps[o, n, 0, w], keeps[o, n, 1, w] = k_re, k_im
                        befores[o, n, 0, w], befores[o, n, 1, w] = h_re, h_im
                        real = k_re * h_re - k_im * h_im + b_re * push[w]
                        imag = k_re * h_im + k_im * h_re + b_im * push[w]
                        state[n, 0, w], state[n, 1, w] = real, imag
                        inner[o, w] += c_re * real - c_im * imag
            for back in range(closing - opening):
                t = closing - 1 - back
                o = t - opening
                for w in range(width):
                    out = gy[t, first + w]
                    if z.size > 0:
                        x = z[t, first + w]
                        gate = sigmoid(x)
                        gz[t, first + w] = out * inner[o, w] * gate * (one + x * (one - gate))
                        out = out * x * gate
                    dy[w] = out
                    gskip[s, first + w] += out * u[t, first + w]
                    push[w] = steps[o, w] * u[t, first + w]
                    dstep[w], dpush[w] = zero, zero
                for n in range(size):
                    b_re, b_im, c_re, c_im = b[t, g, n, 0], b[t, g, n, 1], two * c[t, g, n, 0], two * c[t, g, n, 1]
                    to_b_re, to_b_im, to_c_re, to_c_im = zero, zero, zero, zero
                    for w in range(width):
                        k_re, k_im = keeps[o, n, 0, w], keeps[o, n, 1, w]
                        h_re, h_im = befores[o, n, 0, w], befores[o, n, 1, w]
                        m_re, m_im = k_re * h_re - k_im * h_im, k_re * h_im + k_im * h_re
                        g_re, g_im = grad[n, 0, w] + c_re * dy[w], grad[n, 1, w] - c_im * dy[w]
                        to_c_re += two * dy[w] * (m_re + b_re * push[w])
                        to_c_im -= two * dy[w] * (m_im + b_im * push[w])
                        to_b_re += g_re * push[w]
                        to_b_im += g_im * push[w]
                        dpush[w] += b_re * g_re + b_im * g_im
                        q_re, q_im = g_re * m_re + g_im * m_im, g_im * m_re - g_re * m_im
                        dstep[w] += q_re * rate[n, 0, w] + q_im * rate[n, 1, w]
                        drate[n, 0, w] += q_re * steps[o, w]
                        drate[n, 1, w] += q_im * steps[o, w]
                        grad[n, 0, w] = g_re * k_re + g_im * k_im
                        grad[n, 1, w] = g_im * k_re - g_re * k_im
                    gb[cut, row + t, g, n, 0], gb[cut, row + t, g, n, 1] = to_b_re, to_b_im
                    gc[cut, row + t, g, n, 0], gc[cut, row + t, g, n, 1] = to_c_re, to_c_im
                for w in range(width):
                    x = u[t, first + w]
                    gu[t, first + w] = skip[first + w] * dy[w] + dpush[w] * steps[o, w]
                    total = dstep[w] + dpush[w] * x
                    if soft:
                        total *= sigmoid(raw[t, first + w] + bias[first + w])
                    outside = steps[o, w] <= low or steps[o, w] >= high
                    total = zero if outside else total
                    graw[t, first + w] = total
                    gbias[s, first + w] += total
        for n in range(size):
            for part in range(2):
                for w in range(width):
                    ga[s, n, part, first + w] = drate[n, part, w]
                    if begin > 0:
                        saved[place + begin * stride + 2 * n + part, first + w] = grad[n, part, w]
                    elif wanted:
                        gh_0[s, first + w, n, part] = grad[n, part, w]
