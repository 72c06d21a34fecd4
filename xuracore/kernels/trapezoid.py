"""The keys of Mamba-3: bias, then rotation by an angle that adds up over time.

For one sequence and one head, with N-vectors q and k, ranks r (arXiv 2603.15569)::

    theta_t = theta_{t-1} + rate_t dt_t                      (modulo 2 pi)   rate = pi tanh(angles)
    q~_t, k~_t = rotate(q_t + q_bias, theta_t), rotate(k_t + k_bias, theta_t)

The scan over them (see :mod:`xuracore.ops.trapezoid` for its weights) is that of
:mod:`xuracore.kernels.ssd`.  Rotating pairs of real coordinates by theta is a complex state with
transition ``alpha e^{-i phi}``: see :mod:`xuracore.kernels.complex_state`.

Shapes: q, k ``(B, L, R, G, N)``; dt ``(B, L, H)``; rate ``(B, L, J, S)`` with J = 1 (shared by the heads) or H;
q_bias, k_bias ``(H, R, N)``.  ``half`` pairs coordinates (i, i + N/2), else (2i, 2i + 1), for i < S.
With ``radians`` theta grows by the rate as it is, whatever dt.  Each call does heads ``head … head + U`` of m
pieces of at most Q tokens, ``places`` (m, 3): row of the batch, first token, tokens; head ``j`` uses group
``j // (H // G)``.  What lies behind a piece's rows is not touched.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel, prange
from xuracore.kernels.fastmath import cosine_sine, wrap_angle
from xuracore.kernels.trapezoid_numpy import previous_token_numpy, rotated_keys_numpy, unrotated_keys_numpy


@kernel(twin=rotated_keys_numpy)
def rotated_keys(
    q, k, q_bias, k_bias, rate, dt, places, head, half, radians, theta, cosine, sine, queries, keys
):  # fmt: skip
    """Write queries and keys ``(m, U, Q R, N)`` and the cosine and sine ``(m, U, Q, S)`` of theta ``(m, U, S)``.

    theta is the angle before these tokens, and becomes that after them.
    """
    rank, groups, size = q.shape[2], q.shape[3], q.shape[4]
    per_group = dt.shape[2] // groups
    turns, shared = rate.shape[3], rate.shape[2] == 1
    one = q.dtype.type(1)
    count = theta.shape[1]
    for task in range(theta.shape[0] * count):
        item, u = task // count, task % count
        j = head + u
        g, at = j // per_group, 0 if shared else j
        b, start = places[item, 0], places[item, 1]
        angle, to_queries, to_keys = theta[item, u], queries[item, u], keys[item, u]
        for i in range(places[item, 2]):
            t = start + i
            pace = one if radians else dt[b, t, j]
            speed, c, s = rate[b, t, at], cosine[item, u, i], sine[item, u, i]
            for n in range(turns):
                angle[n] = wrap_angle(angle[n] + speed[n] * pace)
                c[n], s[n] = cosine_sine(angle[n])
            for r in range(rank):
                for query in range(2):
                    if query == 1:
                        source, bias, out = q[b, t, r, g], q_bias[j, r], to_queries[i * rank + r]
                    else:
                        source, bias, out = k[b, t, r, g], k_bias[j, r], to_keys[i * rank + r]
                    for n in range(size):
                        out[n] = source[n] + bias[n]
                    if half:
                        first, second = out[:turns], out[size // 2 :]
                        for n in range(turns):
                            x, z = first[n], second[n]
                            first[n] = x * c[n] - z * s[n]
                            second[n] = x * s[n] + z * c[n]
                    else:
                        for n in range(turns):
                            x, z = out[2 * n], out[2 * n + 1]
                            out[2 * n] = x * c[n] - z * s[n]
                            out[2 * n + 1] = x * s[n] + z * c[n]


@kernel(twin=unrotated_keys_numpy, fastmath=REDUCE)
def unrotated_keys(
    dqueries, dkeys, queries, keys, cosine, sine, rate, dt, places, head, half, radians,
    dtheta, gq, gk, gq_bias, gk_bias, grate, gdt,
):  # fmt: skip
    """Gradients of :func:`rotated_keys`, from those of queries and keys, which are used up.

    dtheta ``(m, U, S)`` is the gradient of the angle after these tokens, and becomes that of the angle before.
    Adds to gq, gk ``(B, L, R, G, N)``, gq_bias, gk_bias ``(H, R, N)`` and grate; writes gdt at its place.
    """
    rank, groups, size = gq.shape[2], gq.shape[3], gq.shape[4]
    per_group = dt.shape[2] // groups
    turns, shared = rate.shape[3], rate.shape[2] == 1
    zero, one = gq.dtype.type(0), gq.dtype.type(1)
    other = size // 2
    count = dtheta.shape[1]
    for task in range(dtheta.shape[0] * count):
        item, u = task // count, task % count
        j = head + u
        g, at = j // per_group, 0 if shared else j
        b, start, tokens = places[item, 0], places[item, 1], places[item, 2]
        dangle = dtheta[item, u]
        for back in range(tokens):
            i = tokens - 1 - back
            t = start + i
            c, s = cosine[item, u, i], sine[item, u, i]
            for r in range(rank):
                for query in range(2):
                    row = i * rank + r
                    if query == 1:
                        x, d, to, bias = queries[item, u, row], dqueries[item, u, row], gq[b, t, r, g], gq_bias[j, r]
                    else:
                        x, d, to, bias = keys[item, u, row], dkeys[item, u, row], gk[b, t, r, g], gk_bias[j, r]
                    if half:
                        first, second, x0, x1 = d[:turns], d[other:], x[:turns], x[other:]
                        for n in range(turns):
                            d0, d1 = first[n], second[n]
                            dangle[n] += d1 * x0[n] - d0 * x1[n]
                            first[n] = d0 * c[n] + d1 * s[n]
                            second[n] = d1 * c[n] - d0 * s[n]
                    else:
                        for n in range(turns):
                            d0, d1 = d[2 * n], d[2 * n + 1]
                            dangle[n] += d1 * x[2 * n] - d0 * x[2 * n + 1]
                            d[2 * n] = d0 * c[n] + d1 * s[n]
                            d[2 * n + 1] = d1 * c[n] - d0 * s[n]
                    for n in range(size):
                        to[n] += d[n]
                        bias[n] += d[n]
            pace = one if radians else dt[b, t, j]
            to_rate, speed = grate[b, t, at], rate[b, t, at]
            along = zero
            for n in range(turns):
                to_rate[n] += dangle[n] * pace
                along += dangle[n] * speed[n]
            gdt[b, t, j] = zero if radians else along


@kernel(twin=previous_token_numpy, parallel=True)
def previous_token(h, share, k_prev, values, state):
    """state ``(S, H, N, P)`` = h + share sum_r k_prev_r values_r^T: what the first token adds of the one before.

    h ``(S, H, N, P)``, share ``(S, H)``, k_prev ``(S, R, H, N)``, values ``(S, R, H, P)``.
    """
    count, heads, size, width = h.shape
    rank = k_prev.shape[1]
    for index in prange(count * heads):
        task = np.int64(index)
        s, j = task // heads, task % heads
        for n in range(size):
            source, out = h[s, j, n], state[s, j, n]
            for p in range(width):
                out[p] = source[p]
            for r in range(rank):
                weight, value = share[s, j] * k_prev[s, r, j, n], values[s, r, j]
                for p in range(width):
                    out[p] += weight * value[p]
