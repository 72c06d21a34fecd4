"""Linear state spaces with constant coefficients, step by step: S4D, and S4 in O(N) a step.

One state of N complex numbers a feature stands for N conjugate pairs.  With <p, x> = 2 Re sum conj(p) x,
the step of S4 (arXiv 2111.00396; diagonal plus low rank, bilinear rule) is::

    w  = keep x + enter u - q <p, x>          y = 2 Re sum c x'
    x' = w - q r <p, w>

and with q = 0 it is the diagonal one.  Backward, with g = dL/dRe + i dL/dIm of x'::

    t = -Re sum conj(q) g     g_w = g + 2 t r p        s = -Re sum conj(q) g_w      g_x = conj(keep) g_w + 2 s p

Everything is float64: coefficients rounded to float32 would turn by a wrong angle at each of
thousands of steps.  Shapes: u ``(B, L, H)``; keep, enter, p, q ``(H, 2, N)``, real parts first; r ``(H,)``;
c ``(K, H, 2, N)``; states ``(B, H, 2, N)``; y ``(B, L, K, H)``.  A task is one feature of one sequence.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel


def _complex(x):
    return x[..., 0, :] + 1j * x[..., 1, :]


def _parts(x):
    return np.stack([x.real, x.imag], axis=-2)


def linear_state_forward_numpy(u, keep, enter, p, q, r, c, x_0, low_rank, block, y, x_last, saved):
    """NumPy twin of :func:`linear_state_forward`."""
    keep, enter, p, q, c, x = (_complex(value) for value in (keep, enter, p, q, c, x_0))
    for t in range(u.shape[1]):
        if t % block == 0:
            saved[:, t // block] = _parts(x)
        w = keep * x + enter * u[:, t, :, None] - q * _inner(p, x)
        x = w - q * r[:, None] * _inner(p, w)
        y[:, t] = 2 * (c * x[:, None]).real.sum(-1)
    x_last[...] = _parts(x)


def _inner(p, x):
    return 2 * (p.conj() * x).real.sum(-1, keepdims=True)


def linear_state_backward_numpy(
    u, keep, enter, p, q, r, c, low_rank, block, saved, gy, gx_last, gu, gkeep, genter, gp, gq, gr, gc, gx_0
):  # fmt: skip
    """NumPy twin of :func:`linear_state_backward`."""
    keep, enter, p, q, c, g = (_complex(value) for value in (keep, enter, p, q, c, gx_last))
    before, middle = [_complex(saved[:, 0])], []
    for t in range(u.shape[1]):
        w = keep * before[-1] + enter * u[:, t, :, None] - q * _inner(p, before[-1])
        middle.append(w)
        before.append(w - q * r[:, None] * _inner(p, w))
    sums = [np.zeros(before[0].shape, complex) for _ in range(4)]
    to_r, to_c = np.zeros(gr.shape), np.zeros(gc.shape[:-2] + gc.shape[-1:], complex)
    for t in reversed(range(u.shape[1])):
        x, w, after = before[t], middle[t], before[t + 1]
        g = g + 2 * (c.conj() * gy[:, t, :, :, None]).sum(1)
        to_c += 2 * gy[:, t, :, :, None] * after[:, None].conj()
        back, span = -(q.conj() * g).real.sum(-1, keepdims=True), _inner(p, w)
        to_r += (back * span)[..., 0]
        sums[3] -= r[:, None] * span * g
        sums[2] += 2 * back * r[:, None] * w
        g = g + 2 * back * r[:, None] * p
        back = -(q.conj() * g).real.sum(-1, keepdims=True)
        sums[3] -= _inner(p, x) * g
        sums[2] += 2 * back * x
        sums[0] += g * x.conj()
        sums[1] += g * u[:, t, :, None]
        gu[:, t] = (enter.conj() * g).real.sum(-1)
        g = keep.conj() * g + 2 * back * p
    for out, value in zip((gkeep, genter, gp, gq, gc, gx_0), (*sums, to_c, g)):
        out[...] = _parts(value)
    gr[...] = to_r


@kernel(twin=linear_state_forward_numpy, fastmath=REDUCE)
def linear_state_forward(start, stop, u, keep, enter, p, q, r, c, x_0, low_rank, block, y, x_last, saved):
    """L steps; writes y, x_last and saved ``(B, ceil(L / block), H, 2, N)``.  ``B H`` tasks."""
    length, features = u.shape[1], u.shape[2]
    channels, size = c.shape[0], c.shape[3]
    re, im = np.empty(size, u.dtype), np.empty(size, u.dtype)
    two = u.dtype.type(2)
    for task in range(start, stop):
        b, h = task // features, task % features
        a_re, a_im, b_re, b_im = keep[h, 0], keep[h, 1], enter[h, 0], enter[h, 1]
        p_re, p_im, q_re, q_im = p[h, 0], p[h, 1], q[h, 0], q[h, 1]
        for n in range(size):
            re[n], im[n] = x_0[b, h, 0, n], x_0[b, h, 1, n]
        for t in range(length):
            if t % block == 0:
                for n in range(size):
                    saved[b, t // block, h, 0, n] = re[n]
                    saved[b, t // block, h, 1, n] = im[n]
            x = u[b, t, h]
            if low_rank:
                span = u.dtype.type(0)
                for n in range(size):
                    span += p_re[n] * re[n] + p_im[n] * im[n]
                span, second = two * span, u.dtype.type(0)
                for n in range(size):
                    real = a_re[n] * re[n] - a_im[n] * im[n] + b_re[n] * x - q_re[n] * span
                    imag = a_re[n] * im[n] + a_im[n] * re[n] + b_im[n] * x - q_im[n] * span
                    second += p_re[n] * real + p_im[n] * imag
                    re[n], im[n] = real, imag
                second *= two * r[h]
                for n in range(size):
                    re[n] -= q_re[n] * second
                    im[n] -= q_im[n] * second
            else:
                for n in range(size):
                    real = a_re[n] * re[n] - a_im[n] * im[n] + b_re[n] * x
                    im[n] = a_re[n] * im[n] + a_im[n] * re[n] + b_im[n] * x
                    re[n] = real
            for k in range(channels):
                out, c_re, c_im = u.dtype.type(0), c[k, h, 0], c[k, h, 1]
                for n in range(size):
                    out += c_re[n] * re[n] - c_im[n] * im[n]
                y[b, t, k, h] = two * out
        for n in range(size):
            x_last[b, h, 0, n], x_last[b, h, 1, n] = re[n], im[n]


@kernel(twin=linear_state_backward_numpy, fastmath=REDUCE)
def linear_state_backward(
    start, stop, u, keep, enter, p, q, r, c, low_rank, block, saved, gy, gx_last,
    gu, gkeep, genter, gp, gq, gr, gc, gx_0,
):  # fmt: skip
    """Gradients of :func:`linear_state_forward`; those of coefficients have a leading B, for the caller to sum."""
    length, features = u.shape[1], u.shape[2]
    channels, size = c.shape[0], c.shape[3]
    zero, two = u.dtype.type(0), u.dtype.type(2)
    states, middle = np.empty((block + 1, 2, size), u.dtype), np.empty((block, 2, size), u.dtype)
    firsts, seconds = np.empty(block, u.dtype), np.empty(block, u.dtype)
    g_re, g_im = np.empty(size, u.dtype), np.empty(size, u.dtype)
    for task in range(start, stop):
        b, h = task // features, task % features
        a_re, a_im, b_re, b_im = keep[h, 0], keep[h, 1], enter[h, 0], enter[h, 1]
        p_re, p_im, q_re, q_im = p[h, 0], p[h, 1], q[h, 0], q[h, 1]
        for part in range(2):
            for n in range(size):
                gkeep[b, h, part, n], genter[b, h, part, n] = zero, zero
                gp[b, h, part, n], gq[b, h, part, n] = zero, zero
                for k in range(channels):
                    gc[b, k, h, part, n] = zero
        gr[b, h] = zero
        for n in range(size):
            g_re[n], g_im[n] = gx_last[b, h, 0, n], gx_last[b, h, 1, n]
        blocks = (length + block - 1) // block
        for done in range(blocks):
            opening = (blocks - 1 - done) * block
            closing = min(opening + block, length)
            for part in range(2):
                for n in range(size):
                    states[0, part, n] = saved[b, blocks - 1 - done, h, part, n]
            for t in range(opening, closing):
                o, x = t - opening, u[b, t, h]
                re, im, w_re, w_im = states[o, 0], states[o, 1], middle[o, 0], middle[o, 1]
                x_re, x_im = states[o + 1, 0], states[o + 1, 1]
                span, second = zero, zero
                if low_rank:
                    for n in range(size):
                        span += p_re[n] * re[n] + p_im[n] * im[n]
                    span *= two
                for n in range(size):
                    w_re[n] = a_re[n] * re[n] - a_im[n] * im[n] + b_re[n] * x - q_re[n] * span
                    w_im[n] = a_re[n] * im[n] + a_im[n] * re[n] + b_im[n] * x - q_im[n] * span
                if low_rank:
                    for n in range(size):
                        second += p_re[n] * w_re[n] + p_im[n] * w_im[n]
                    second *= two
                for n in range(size):
                    x_re[n] = w_re[n] - q_re[n] * r[h] * second
                    x_im[n] = w_im[n] - q_im[n] * r[h] * second
                firsts[o], seconds[o] = span, second
            for back in range(closing - opening):
                t = closing - 1 - back
                o, x = t - opening, u[b, t, h]
                re, im, w_re, w_im = states[o, 0], states[o, 1], middle[o, 0], middle[o, 1]
                x_re, x_im = states[o + 1, 0], states[o + 1, 1]
                for k in range(channels):
                    out, c_re, c_im = two * gy[b, t, k, h], c[k, h, 0], c[k, h, 1]
                    to_re, to_im = gc[b, k, h, 0], gc[b, k, h, 1]
                    for n in range(size):
                        g_re[n] += out * c_re[n]
                        g_im[n] -= out * c_im[n]
                        to_re[n] += out * x_re[n]
                        to_im[n] -= out * x_im[n]
                if low_rank:
                    along = zero
                    for n in range(size):
                        along -= q_re[n] * g_re[n] + q_im[n] * g_im[n]
                    gr[b, h] += along * seconds[o]
                    pull, push = r[h] * seconds[o], two * along * r[h]
                    for n in range(size):
                        gq[b, h, 0, n] -= pull * g_re[n]
                        gq[b, h, 1, n] -= pull * g_im[n]
                        gp[b, h, 0, n] += push * w_re[n]
                        gp[b, h, 1, n] += push * w_im[n]
                        g_re[n] += push * p_re[n]
                        g_im[n] += push * p_im[n]
                    along = zero
                    for n in range(size):
                        along -= q_re[n] * g_re[n] + q_im[n] * g_im[n]
                    pull, push = firsts[o], two * along
                    for n in range(size):
                        gq[b, h, 0, n] -= pull * g_re[n]
                        gq[b, h, 1, n] -= pull * g_im[n]
                        gp[b, h, 0, n] += push * re[n]
                        gp[b, h, 1, n] += push * im[n]
                else:
                    push = zero
                total = zero
                for n in range(size):
                    real, imag = g_re[n], g_im[n]
                    gkeep[b, h, 0, n] += real * re[n] + imag * im[n]
                    gkeep[b, h, 1, n] += imag * re[n] - real * im[n]
                    genter[b, h, 0, n] += real * x
                    genter[b, h, 1, n] += imag * x
                    total += b_re[n] * real + b_im[n] * imag
                    g_re[n] = a_re[n] * real + a_im[n] * imag + push * p_re[n]
                    g_im[n] = a_re[n] * imag - a_im[n] * real + push * p_im[n]
                gu[b, t, h] = total
        for n in range(size):
            gx_0[b, h, 0, n], gx_0[b, h, 1, n] = g_re[n], g_im[n]
