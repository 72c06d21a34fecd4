"""NumPy form of the Mamba-3 scan: a loop over time on arrays of all sequences and heads.

Same arguments and effects as the kernels in :mod:`xuracore.kernels.trapezoid`, whose docstring has
the mathematics; read this form first.
"""

import numpy as np


def rotate(x, cosine, sine, half):
    """Rotate pairs of the last axis of ``x`` by the angles whose cosine and sine are given.

    x ``(…, N)``, cosine and sine ``(…, S)``; coordinates beyond the S pairs stay as they are.
    """
    first, second = _pairs(x.shape[-1], cosine.shape[-1], half)
    out = x.copy()
    out[..., first] = x[..., first] * cosine - x[..., second] * sine
    out[..., second] = x[..., first] * sine + x[..., second] * cosine
    return out


def _pairs(size, turns, half):
    i = np.arange(turns)
    return (i, i + size // 2) if half else (2 * i, 2 * i + 1)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def _to_heads(x, heads):
    """(B, L, R, G, N) to (B, L, H, R, N)."""
    return np.repeat(x, heads // x.shape[3], axis=3).swapaxes(2, 3)


def _weights(dt, a, trap, mask):
    """alpha, gamma, s and lambda of each token, and beta' of the first real one; masked tokens idle."""
    real = mask.astype(bool)[:, :, None]
    mix = _sigmoid(trap)
    alpha = np.where(real, np.exp(a * dt), 1).astype(dt.dtype)
    gamma = np.where(real, mix * dt, 0).astype(dt.dtype)
    behind = np.where(real, (1 - mix) * dt, 0).astype(dt.dtype)
    s, ahead = np.zeros_like(dt), np.zeros_like(dt[:, 0])
    for t in reversed(range(dt.shape[1])):
        s[:, t] = np.where(real[:, t], gamma[:, t] + ahead, 0)
        ahead = np.where(real[:, t], behind[:, t], ahead)
    return alpha, gamma, s, mix, ahead


def _scan(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask, theta_0, h_0, k_0, v_0, half, radians
):  # fmt: skip
    """All intermediate values, time first: theta (L+1, B, H, S), H (L+1, B, H, N, P), rotated q and k …"""
    length, heads = q.shape[1], v.shape[2]
    alpha, gamma, s, mix, ahead = _weights(dt, a, trap, mask)
    real = mask.astype(bool)
    kb, qb = _to_heads(k, heads) + k_bias, _to_heads(q, heads) + q_bias
    phi = angles + 0 * dt[..., None] if radians else np.pi * np.tanh(angles) * dt[..., None]
    phi = np.where(real[:, :, None, None], phi, 0).astype(q.dtype)
    vr = v[:, :, :, None, :] * psi
    theta = [theta_0]
    push = np.einsum("brhn,bhrp->bhnp", k_0, v_0[:, :, None, :] * psi)
    states = [h_0.swapaxes(2, 3) + ahead[:, :, None, None] * push]
    kr, qr, y = np.empty_like(kb), np.empty_like(qb), np.empty(vr.shape, q.dtype)
    for t in range(length):
        turned = np.mod(theta[-1] + phi[:, t], q.dtype.type(2 * np.pi))
        theta.append(np.where(real[:, t, None, None], turned, theta[-1]))
        cosine, sine = np.cos(theta[-1])[:, :, None, :], np.sin(theta[-1])[:, :, None, :]
        kr[:, t], qr[:, t] = rotate(kb[:, t], cosine, sine, half), rotate(qb[:, t], cosine, sine, half)
        decayed = alpha[:, t, :, None, None] * states[-1]
        scores = gamma[:, t, :, None, None] * np.einsum("bhrn,bhun->bhru", qr[:, t], kr[:, t])
        y[:, t] = qr[:, t] @ decayed + scores @ vr[:, t] + skip[:, None, None] * vr[:, t]
        y[~real[:, t], t] = 0
        states.append(decayed + s[:, t, :, None, None] * (kr[:, t].swapaxes(2, 3) @ vr[:, t]))
    return y, np.stack(theta), np.stack(states), kr, qr, vr, (alpha, gamma, s, mix, ahead)


def trapezoid_forward_numpy(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask,
    theta_0, h_0, k_0, v_0, half, radians, block,
    y, theta_last, h_last, k_last, v_last, saved_h, saved_theta,
):  # fmt: skip
    """NumPy twin of :func:`xuracore.kernels.trapezoid.trapezoid_forward`."""
    length = q.shape[1]
    out, theta, states, kr, _, _, _ = _scan(
        q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask, theta_0, h_0, k_0, v_0, half, radians
    )  # fmt: skip
    y[...] = out.transpose(0, 1, 3, 2, 4)
    saved_h[...] = states[:length:block].transpose(1, 2, 0, 3, 4)
    saved_theta[...] = theta[:length:block].transpose(1, 2, 0, 3)
    theta_last[...] = theta[-1]
    h_last[...] = states[-1].swapaxes(2, 3)
    k_last[...], v_last[...] = k_0, v_0
    for b in range(len(q)):
        (real,) = np.nonzero(mask[b])
        if real.size:
            k_last[b] = kr[b, real[-1]].swapaxes(0, 1)
            v_last[b] = v[b, real[-1]]
        else:
            h_last[b] = h_0[b]


def trapezoid_backward_numpy(
    q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask,
    k_0, v_0, half, radians, block, saved_h, saved_theta,
    gy, gtheta_last, gh_last, gk_last, gv_last,
    gq, gk, gv, gdt, ga, gtrap, gangles, gq_bias, gk_bias, gskip, gpsi, gtheta_0, gh_0, gk_0, gv_0,
):  # fmt: skip
    """NumPy twin of :func:`xuracore.kernels.trapezoid.trapezoid_backward`.

    Starts from the first stored state and recomputes everything at once.
    """
    batch, length, rank, groups, size = q.shape
    heads, parts = v.shape[2], gq.shape[0]
    weights = _weights(dt, a, trap, mask)
    entering = saved_h[:, :, 0].swapaxes(2, 3) if length else gh_last
    nothing = np.zeros_like(k_0)  # the stored state already contains the previous token's share
    _, theta, states, kr, qr, vr, _ = _scan(
        q, k, v, dt, a, trap, angles, q_bias, k_bias, skip, psi, mask,
        saved_theta[:, :, 0], entering, nothing, v_0, half, radians,
    )  # fmt: skip
    alpha, gamma, s, mix, ahead = weights
    real = mask.astype(bool)
    last = np.array([np.nonzero(row)[0][-1] if row.any() else -1 for row in mask])
    grad, dtheta = gh_last.swapaxes(2, 3).copy(), gtheta_last.copy()
    dgamma, dbehind = np.zeros_like(dt), np.zeros_like(dt)
    dq, dk = np.zeros_like(qr), np.zeros_like(kr)
    dvr, dphi = np.zeros_like(vr), np.zeros(dt.shape + (angles.shape[3],), q.dtype)
    ga[...], gskip[...] = 0, 0
    following = np.full(batch, -1)
    rows = np.arange(batch)
    first, second = _pairs(size, angles.shape[3], half)
    for t in reversed(range(length)):
        on = real[:, t, None, None, None]
        dy = np.where(on, gy[:, t].swapaxes(1, 2), 0)
        h, kt, qt, vt = states[t], kr[:, t], qr[:, t], vr[:, t]
        g_t, s_t, a_t = (w[:, t, :, None, None] for w in (gamma, s, alpha))
        dots_qk, dots_yv = qt @ kt.swapaxes(2, 3), dy @ vt.swapaxes(2, 3)
        dgain = np.where(real[:, t, None], np.einsum("bhnp,bhrn,bhrp->bh", grad, kt, vt), 0)
        reading = dy @ h.swapaxes(2, 3)
        ddecay = np.einsum("bhnp,bhnp->bh", grad, h) + np.einsum("bhrn,bhrn->bh", qt, reading)
        dgamma[:, t] = dgain + np.einsum("bhru,bhru->bh", dots_qk, dots_yv)
        dbehind[rows[following >= 0], following[following >= 0]] = dgain[following >= 0]
        dqt = a_t * reading + g_t * (dots_yv @ kt)
        dkt = s_t * (vt @ grad.swapaxes(2, 3)) + g_t * (dots_yv.swapaxes(2, 3) @ qt)
        dvt = s_t * (kt @ grad) + g_t * (dots_qk.swapaxes(2, 3) @ dy) + skip[:, None, None] * dy
        dkt += np.where((last == t)[:, None, None, None], gk_last.swapaxes(1, 2), 0)
        gskip += np.einsum("bhrr->bh", dots_yv)
        ga[:, t] = np.where(real[:, t, None], ddecay * alpha[:, t], 0)
        grad = a_t * (grad + qt.swapaxes(2, 3) @ dy)
        turn = np.zeros_like(dtheta)
        for moved, value in ((dqt, qt), (dkt, kt)):
            turn += (moved[..., second] * value[..., first] - moved[..., first] * value[..., second]).sum(2)
        dtheta = dtheta + np.where(real[:, t, None, None], turn, 0)
        dphi[:, t] = np.where(real[:, t, None, None], dtheta, 0)
        cosine, sine = np.cos(theta[t + 1])[:, :, None, :], np.sin(theta[t + 1])[:, :, None, :]
        dq[:, t] = np.where(on, rotate(dqt, cosine, -sine, half), 0)
        dk[:, t] = np.where(on, rotate(dkt, cosine, -sine, half), 0)
        dvr[:, t] = np.where(on, dvt, 0)
        following = np.where(real[:, t], t, following)

    psi_v0 = psi * v_0[:, :, None, :]
    dbehind[rows[following >= 0], following[following >= 0]] = np.einsum(
        "bhnp,brhn,bhrp->bh", grad, k_0, psi_v0
    )[following >= 0]
    dpush = ahead[:, :, None, None] * grad
    idle = following < 0
    gk_0[...] = np.einsum("bhnp,bhrp->brhn", dpush, psi_v0)
    gk_0[idle] = gk_last[idle]
    dv_0 = np.einsum("bhnp,brhn->bhrp", dpush, k_0)
    gv_0[...] = (psi * dv_0).sum(2)
    gv_0[idle] = gv_last[idle]
    gh_0[...], gtheta_0[...] = grad.swapaxes(2, 3), dtheta
    gpsi[...] = np.einsum("blhrp,blhp->bhrp", dvr, v) + dv_0 * v_0[:, :, None, :]
    gv[...] = (psi * dvr).sum(3)
    gv[rows[~idle], last[~idle]] += gv_last[~idle]
    gdt[...] = mix * dgamma + (1 - mix) * dbehind + ga * a
    spread = dphi
    if not radians:
        rate = np.pi * np.tanh(angles)
        spread = dphi * dt[..., None] * (np.pi - rate * rate / np.pi)
        gdt += (dphi * rate).sum(3)
    gdt[~real] = 0
    gtrap[...] = dt * (dgamma - dbehind) * mix * (1 - mix)
    ga *= dt
    gq_bias[...], gk_bias[...] = dq.sum(1), dk.sum(1)
    for out, each in ((gq, dq), (gk, dk)):
        split = each.swapaxes(2, 3).reshape(batch, length, rank, groups, parts, -1, size)
        out[...] = np.moveaxis(split.sum(5), 4, 0)
    if angles.shape[2] == 1:
        runs = spread.reshape(batch, length, groups * parts, heads // groups // parts, angles.shape[3]).sum(3)
        gangles[...] = np.moveaxis(runs, 2, 0)[:, :, :, None]
    else:
        gangles[0] = spread
