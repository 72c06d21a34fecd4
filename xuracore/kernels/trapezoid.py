"""The Mamba-3 scan: exponential-trapezoidal update with a cumulative, data-dependent rotation.

For one sequence and one head, with P-vectors v, N-vectors q and k, ranks r (arXiv 2603.15569)::

    alpha_t = exp(a_t dt_t)      lambda_t = sigmoid(trap_t)
    gamma_t = lambda_t dt_t      beta'_t  = (1 - lambda_t) dt_t
    theta_t = theta_{t-1} + pi tanh(angles_t) dt_t                      (modulo 2 pi)
    q~_t, k~_t = rotate(q_t + q_bias, theta_t), rotate(k_t + k_bias, theta_t)
    h_t = alpha_t (h_{t-1} + beta'_t sum_r v_{t-1,r} k~_{t-1,r}^T) + gamma_t sum_r v_{t,r} k~_{t,r}^T
    y_{t,r} = h_t q~_{t,r} + D v_{t,r}                                   v_{t,r} = psi_r v_t

The loops carry the state with the next token's share of this token already in it,
``H_t = h_t + beta'_{t+1} sum_r v_{t,r} k~_{t,r}^T``, so that each token is one decay and one update::

    H_t = alpha_t H_{t-1} + s_t sum_r v_{t,r} k~_{t,r}^T       s_t = gamma_t + beta'_{t+1}
    y_{t,r} = alpha_t H_{t-1} q~_{t,r} + gamma_t sum_u (q~_{t,r} . k~_{t,u}) v_{t,u} + D v_{t,r}

with beta' = 0 after the last token, where H = h.  Rotating pairs of real coordinates by theta is a
complex state with transition ``alpha e^{-i phi}``: see :mod:`xuracore.kernels.complex_state`.

Shapes: q, k ``(B, L, R, G, N)``; v ``(B, L, H, P)``; dt, a, trap ``(B, L, H)``; angles
``(B, L, J, S)`` with J = 1 (shared by the heads) or H; q_bias, k_bias ``(H, R, N)``; skip ``(H,)``;
psi ``(H, R, P)``; mask ``(B, L)`` uint8; the state theta ``(B, H, S)``, h ``(B, H, P, N)``,
k_prev ``(B, R, H, N)`` (rotated), v_prev ``(B, H, P)``; y ``(B, L, R, H, P)``.  Head ``j`` uses group
``j // (H // G)``.  ``half`` pairs coordinates (i, i + N/2), else (2i, 2i + 1), for i < S.
With ``radians`` theta grows by ``angles_t`` as it is.
A token with mask 0 leaves the whole state as it is and gives y = 0.

Every ``block`` tokens the forward pass stores H (as ``(N, P)``) and theta; the backward pass
recomputes one block at a time into a scratch that stays in the L2 cache.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import cosine_sine, exp, sigmoid, tanh, wrap_angle
from xuracore.kernels.trapezoid_numpy import trapezoid_backward_numpy, trapezoid_forward_numpy


@kernel(twin=trapezoid_forward_numpy, fastmath=REDUCE)
def trapezoid_forward(
    start, stop,
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask,
    theta_0, h_0, k_0, v_0, half, radians, block,
    y, theta_last, h_last, k_last, v_last, saved_h, saved_theta,
):  # fmt: skip
    """Scan L tokens.  Writes everything from ``y`` on.  Tasks: the B * H heads of all sequences.

    saved_h ``(B, H, ceil(L / block), N, P)`` and saved_theta ``(B, H, ceil(L / block), S)`` receive
    the state before tokens 0, block, 2 block …
    """
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2], v.shape[3]
    per_group = heads // groups
    turns = angles.shape[3]
    shared = angles.shape[2] == 1
    zero, one, pi = q.dtype.type(0), q.dtype.type(1), q.dtype.type(np.pi)
    for task in range(start, stop):
        b, j = task // heads, task % heads
        g = j // per_group
        at = 0 if shared else j
        alpha, gamma, s = np.empty(length, q.dtype), np.empty(length, q.dtype), np.empty(length, q.dtype)
        ahead = zero  # beta' of the next real token
        for back in range(length):
            t = length - 1 - back
            if mask[b, t]:
                mix = sigmoid(trap[b, t, j])
                alpha[t] = exp(a[b, t, j] * dt[b, t, j])
                gamma[t] = mix * dt[b, t, j]
                s[t] = gamma[t] + ahead
                ahead = (one - mix) * dt[b, t, j]

        state = np.empty((size, width), q.dtype)
        theta = np.empty(turns, q.dtype)
        for i in range(turns):
            theta[i] = theta_0[b, j, i]
        cosine, sine = np.empty(turns, q.dtype), np.empty(turns, q.dtype)
        kr, qr = np.empty((rank, size), q.dtype), np.empty((rank, size), q.dtype)
        vr, out = np.empty((rank, width), q.dtype), np.empty((rank, width), q.dtype)
        for n in range(size):
            for p in range(width):
                total = zero
                for r in range(rank):
                    total += psi[j, r, p] * k_0[b, r, j, n]
                state[n, p] = h_0[b, j, p, n] + ahead * v_0[b, j, p] * total
        last = -1
        for t in range(length):
            if t % block == 0:
                for n in range(size):
                    for p in range(width):
                        saved_h[b, j, t // block, n, p] = state[n, p]
                for i in range(turns):
                    saved_theta[b, j, t // block, i] = theta[i]
            if mask[b, t] == 0:
                for r in range(rank):
                    for p in range(width):
                        y[b, t, r, j, p] = zero
                continue
            last = t
            for i in range(turns):
                turn = angles[b, t, at, i] if radians else pi * tanh(angles[b, t, at, i]) * dt[b, t, j]
                theta[i] = wrap_angle(theta[i] + turn)
                cosine[i], sine[i] = cosine_sine(theta[i])
            for r in range(rank):
                for n in range(size):
                    kr[r, n] = k[b, t, r, g, n] + k_bias[j, r, n]
                    qr[r, n] = q[b, t, r, g, n] + q_bias[j, r, n]
                for i in range(turns):
                    first = i if half else 2 * i
                    second = i + size // 2 if half else 2 * i + 1
                    x0, x1 = kr[r, first], kr[r, second]
                    kr[r, first] = x0 * cosine[i] - x1 * sine[i]
                    kr[r, second] = x0 * sine[i] + x1 * cosine[i]
                    x0, x1 = qr[r, first], qr[r, second]
                    qr[r, first] = x0 * cosine[i] - x1 * sine[i]
                    qr[r, second] = x0 * sine[i] + x1 * cosine[i]
                for p in range(width):
                    vr[r, p] = psi[j, r, p] * v[b, t, j, p]
                    out[r, p] = skip[j] * vr[r, p]
            for r in range(rank):
                for u in range(rank):
                    dot = zero
                    for n in range(size):
                        dot += qr[r, n] * kr[u, n]
                    for p in range(width):
                        out[r, p] += gamma[t] * dot * vr[u, p]
            decay, gain = alpha[t], s[t]
            if rank == 1:
                for n in range(size):
                    weight, push = qr[0, n], gain * kr[0, n]
                    for p in range(width):
                        x = decay * state[n, p]
                        out[0, p] += weight * x
                        state[n, p] = x + push * vr[0, p]
            else:
                for n in range(size):
                    for p in range(width):
                        state[n, p] *= decay
                    for r in range(rank):
                        weight = qr[r, n]
                        for p in range(width):
                            out[r, p] += weight * state[n, p]
                    for r in range(rank):
                        push = gain * kr[r, n]
                        for p in range(width):
                            state[n, p] += push * vr[r, p]
            for r in range(rank):
                for p in range(width):
                    y[b, t, r, j, p] = out[r, p]
        for i in range(turns):
            theta_last[b, j, i] = theta[i]
        for p in range(width):
            v_last[b, j, p] = v[b, last, j, p] if last >= 0 else v_0[b, j, p]
            for n in range(size):
                h_last[b, j, p, n] = state[n, p] if last >= 0 else h_0[b, j, p, n]
        for r in range(rank):
            for n in range(size):
                k_last[b, r, j, n] = kr[r, n] if last >= 0 else k_0[b, r, j, n]


@kernel(twin=trapezoid_backward_numpy, fastmath=REDUCE)
def trapezoid_backward(
    start, stop,
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask,
    k_0, v_0, half, radians, block, saved_h, saved_theta,
    gy, gtheta_last, gh_last, gk_last, gv_last,
    gq, gk, gv, gdt, ga, gtrap, gangles, gq_bias, gk_bias, gskip, gpsi, gtheta_0, gh_0, gk_0, gv_0,
):  # fmt: skip
    """Gradients of :func:`trapezoid_forward`; writes everything from ``gq`` on.  B * G * parts tasks.

    Heads that share a group also share gq and gk, and all heads share gangles when J = 1.  One task
    walks a run of heads one after another, so there is one partial per run, summed by the caller:
    gq, gk ``(parts, B, L, R, G, N)`` where ``parts`` divides H / G; gangles ``(W, B, L, J, S)`` with
    W = G * parts if J = 1, else 1.  gq_bias, gk_bias ``(B, H, R, N)``, gskip ``(B, H)`` and gpsi
    ``(B, H, R, P)`` are one partial per sequence.
    """
    batch, length, rank, groups, size = q.shape
    heads, width = v.shape[2], v.shape[3]
    parts = gq.shape[0]
    run = heads // groups // parts
    turns = angles.shape[3]
    shared = angles.shape[2] == 1
    zero, one, pi = q.dtype.type(0), q.dtype.type(1), q.dtype.type(np.pi)
    blocks = (length + block - 1) // block
    for task in range(start, stop):
        b, slot = task // (groups * parts), task % (groups * parts)
        g, part = slot // parts, slot % parts
        for t in range(length):
            for r in range(rank):
                for n in range(size):
                    gq[part, b, t, r, g, n] = zero
                    gk[part, b, t, r, g, n] = zero
            if shared:
                for i in range(turns):
                    gangles[slot, b, t, 0, i] = zero
        theta, dtheta = np.empty(turns, q.dtype), np.empty(turns, q.dtype)
        rate = np.empty((length, turns), q.dtype)  # of turning: shared by the run where J = 1
        alpha, gamma, s = np.empty(length, q.dtype), np.empty(length, q.dtype), np.empty(length, q.dtype)
        mix = np.empty(length, q.dtype)
        states = np.empty((block, size, width), q.dtype)
        cosine, sine = np.empty((block, turns), q.dtype), np.empty((block, turns), q.dtype)
        kr, qr = np.empty((block, rank, size), q.dtype), np.empty((block, rank, size), q.dtype)
        vr, dy = np.empty((rank, width), q.dtype), np.empty((rank, width), q.dtype)
        dvr = np.empty((rank, width), q.dtype)
        dkr, dqr = np.empty((rank, size), q.dtype), np.empty((rank, size), q.dtype)
        state, grad = np.empty((size, width), q.dtype), np.empty((size, width), q.dtype)
        for j in range(slot * run, (slot + 1) * run):
            at = 0 if shared else j
            if not shared or j == slot * run:
                for t in range(length):
                    for i in range(turns):
                        rate[t, i] = angles[b, t, at, i] if radians else pi * tanh(angles[b, t, at, i])
            ahead = zero
            last = -1
            for back in range(length):
                t = length - 1 - back
                if mask[b, t]:
                    mix[t] = sigmoid(trap[b, t, j])
                    alpha[t] = exp(a[b, t, j] * dt[b, t, j])
                    gamma[t] = mix[t] * dt[b, t, j]
                    s[t] = gamma[t] + ahead
                    ahead = (one - mix[t]) * dt[b, t, j]
                    last = max(last, t)

            for r in range(rank):
                for n in range(size):
                    gq_bias[b, j, r, n] = zero
                    gk_bias[b, j, r, n] = zero
                for p in range(width):
                    gpsi[b, j, r, p] = zero
            dskip = zero
            for n in range(size):
                for p in range(width):
                    grad[n, p] = gh_last[b, j, p, n]
            for i in range(turns):
                dtheta[i] = gtheta_last[b, j, i]
            following = -1  # the real token after t
            for done in range(blocks):
                index = blocks - 1 - done
                opening = index * block
                closing = min(opening + block, length)
                for n in range(size):
                    for p in range(width):
                        state[n, p] = saved_h[b, j, index, n, p]
                for i in range(turns):
                    theta[i] = saved_theta[b, j, index, i]
                for t in range(opening, closing):
                    if mask[b, t] == 0:
                        continue
                    o = t - opening
                    for i in range(turns):
                        theta[i] = wrap_angle(theta[i] + rate[t, i] * (one if radians else dt[b, t, j]))
                        cosine[o, i], sine[o, i] = cosine_sine(theta[i])
                    for r in range(rank):
                        for n in range(size):
                            kr[o, r, n] = k[b, t, r, g, n] + k_bias[j, r, n]
                            qr[o, r, n] = q[b, t, r, g, n] + q_bias[j, r, n]
                        for i in range(turns):
                            first = i if half else 2 * i
                            second = i + size // 2 if half else 2 * i + 1
                            x0, x1 = kr[o, r, first], kr[o, r, second]
                            kr[o, r, first] = x0 * cosine[o, i] - x1 * sine[o, i]
                            kr[o, r, second] = x0 * sine[o, i] + x1 * cosine[o, i]
                            x0, x1 = qr[o, r, first], qr[o, r, second]
                            qr[o, r, first] = x0 * cosine[o, i] - x1 * sine[o, i]
                            qr[o, r, second] = x0 * sine[o, i] + x1 * cosine[o, i]
                        for p in range(width):
                            vr[r, p] = psi[j, r, p] * v[b, t, j, p]
                    decay, gain = alpha[t], s[t]
                    for n in range(size):
                        push = gain * kr[o, 0, n]
                        for p in range(width):
                            x = state[n, p]
                            states[o, n, p] = x
                            state[n, p] = decay * x + push * vr[0, p]
                        for r in range(1, rank):
                            push = gain * kr[o, r, n]
                            for p in range(width):
                                state[n, p] += push * vr[r, p]

                for back in range(closing - opening):
                    t = closing - 1 - back
                    o = t - opening
                    if mask[b, t] == 0:
                        gdt[b, t, j] = zero
                        ga[b, t, j] = zero
                        gtrap[b, t, j] = zero
                        for p in range(width):
                            gv[b, t, j, p] = zero
                        if not shared:
                            for i in range(turns):
                                gangles[0, b, t, j, i] = zero
                        continue
                    decay, gain = alpha[t], s[t]
                    for r in range(rank):
                        for p in range(width):
                            vr[r, p] = psi[j, r, p] * v[b, t, j, p]
                            dy[r, p] = gy[b, t, r, j, p]
                            dvr[r, p] = zero
                    dgain, ddecay = zero, zero
                    if rank == 1:
                        for n in range(size):
                            weight, key = qr[o, 0, n], kr[o, 0, n]
                            along_v, along_y, overlap = zero, zero, zero
                            for p in range(width):
                                x, h = grad[n, p], states[o, n, p]
                                along_v += x * vr[0, p]
                                along_y += h * dy[0, p]
                                overlap += x * h
                                dvr[0, p] += x * key
                                grad[n, p] = decay * (x + weight * dy[0, p])
                            dkr[0, n] = gain * along_v
                            dqr[0, n] = decay * along_y
                            dgain += key * along_v
                            ddecay += overlap + weight * along_y
                    else:
                        for n in range(size):
                            overlap = zero
                            for p in range(width):
                                overlap += grad[n, p] * states[o, n, p]
                            ddecay += overlap
                            for r in range(rank):
                                key = kr[o, r, n]
                                along_v, along_y = zero, zero
                                for p in range(width):
                                    along_v += grad[n, p] * vr[r, p]
                                    along_y += states[o, n, p] * dy[r, p]
                                    dvr[r, p] += grad[n, p] * key
                                dkr[r, n] = gain * along_v
                                dqr[r, n] = decay * along_y
                                dgain += key * along_v
                                ddecay += qr[o, r, n] * along_y
                            for r in range(rank):
                                weight = qr[o, r, n]
                                for p in range(width):
                                    grad[n, p] += weight * dy[r, p]
                            for p in range(width):
                                grad[n, p] *= decay
                    dgamma = dgain
                    for r in range(rank):
                        for p in range(width):
                            dvr[r, p] *= gain
                    for r in range(rank):
                        for u in range(rank):
                            dot_qk, dot_yv = zero, zero
                            for n in range(size):
                                dot_qk += qr[o, r, n] * kr[o, u, n]
                            for p in range(width):
                                dot_yv += dy[r, p] * vr[u, p]
                            dgamma += dot_qk * dot_yv
                            if r == u:
                                dskip += dot_yv
                            for n in range(size):
                                dqr[r, n] += gamma[t] * dot_yv * kr[o, u, n]
                                dkr[u, n] += gamma[t] * dot_yv * qr[o, r, n]
                            both = gamma[t] * dot_qk + (skip[j] if r == u else zero)
                            for p in range(width):
                                dvr[u, p] += both * dy[r, p]
                    for p in range(width):
                        total = gv_last[b, j, p] if t == last else zero
                        for r in range(rank):
                            total += psi[j, r, p] * dvr[r, p]
                            gpsi[b, j, r, p] += v[b, t, j, p] * dvr[r, p]
                        gv[b, t, j, p] = total
                    if t == last:
                        for r in range(rank):
                            for n in range(size):
                                dkr[r, n] += gk_last[b, r, j, n]
                    ddt = mix[t] * dgamma + ddecay * decay * a[b, t, j]
                    for r in range(rank):
                        for i in range(turns):
                            first = i if half else 2 * i
                            second = i + size // 2 if half else 2 * i + 1
                            q0, q1 = dqr[r, first], dqr[r, second]
                            k0, k1 = dkr[r, first], dkr[r, second]
                            dtheta[i] += (
                                q1 * qr[o, r, first] - q0 * qr[o, r, second]
                                + k1 * kr[o, r, first] - k0 * kr[o, r, second]
                            )  # fmt: skip
                            dqr[r, first] = q0 * cosine[o, i] + q1 * sine[o, i]
                            dqr[r, second] = q1 * cosine[o, i] - q0 * sine[o, i]
                            dkr[r, first] = k0 * cosine[o, i] + k1 * sine[o, i]
                            dkr[r, second] = k1 * cosine[o, i] - k0 * sine[o, i]
                        for n in range(size):
                            gq_bias[b, j, r, n] += dqr[r, n]
                            gk_bias[b, j, r, n] += dkr[r, n]
                            gq[part, b, t, r, g, n] += dqr[r, n]
                            gk[part, b, t, r, g, n] += dkr[r, n]
                    for i in range(turns):
                        slope = dtheta[i]
                        if not radians:
                            ddt += dtheta[i] * rate[t, i]
                            slope = dtheta[i] * dt[b, t, j] * (pi - rate[t, i] * rate[t, i] / pi)
                        if shared:
                            gangles[slot, b, t, 0, i] += slope
                        else:
                            gangles[0, b, t, j, i] = slope
                    ga[b, t, j] = ddecay * decay * dt[b, t, j]
                    gdt[b, t, j] = ddt
                    gtrap[b, t, j] = dt[b, t, j] * dgamma * mix[t] * (one - mix[t])
                    if following >= 0:  # beta' of the following token is part of this token's s
                        f = following
                        gdt[b, f, j] += (one - mix[f]) * dgain
                        gtrap[b, f, j] -= dt[b, f, j] * dgain * mix[f] * (one - mix[f])
                    following = t

            for i in range(turns):
                gtheta_0[b, j, i] = dtheta[i]
            dahead = zero
            for p in range(width):
                gv_0[b, j, p] = zero if following >= 0 else gv_last[b, j, p]
            for r in range(rank):
                for p in range(width):
                    dvr[r, p] = zero
                for n in range(size):
                    total = zero
                    for p in range(width):
                        total += grad[n, p] * psi[j, r, p] * v_0[b, j, p]
                        dvr[r, p] += grad[n, p] * k_0[b, r, j, n]
                    dahead += k_0[b, r, j, n] * total
                    gk_0[b, r, j, n] = ahead * total
                    if following < 0:
                        gk_0[b, r, j, n] = gk_last[b, r, j, n]
                for p in range(width):
                    gv_0[b, j, p] += ahead * psi[j, r, p] * dvr[r, p]
                    gpsi[b, j, r, p] += ahead * v_0[b, j, p] * dvr[r, p]
            if following >= 0:
                f = following
                gdt[b, f, j] += (one - mix[f]) * dahead
                gtrap[b, f, j] -= dt[b, f, j] * dahead * mix[f] * (one - mix[f])
            for n in range(size):
                for p in range(width):
                    gh_0[b, j, p, n] = grad[n, p]
            gskip[b, j] = dskip
