"""NumPy form of the rotation of Mamba-3's keys.

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


def _steps(rate, dt, b, start, head, count, tokens, radians):
    """rate (U, Q, S) and what each token's is multiplied by (U, Q, 1)."""
    times, heads = slice(start, start + tokens), slice(head, head + count)
    speed = rate[b, times, slice(None) if rate.shape[2] == 1 else heads].swapaxes(0, 1)
    pace = dt[b, times, heads].T[:, :, None]
    return speed, np.ones_like(pace) if radians else pace


def rotated_keys_numpy(
    q, k, q_bias, k_bias, rate, dt, places, head, half, radians, theta, cosine, sine, queries, keys
):  # fmt: skip
    """NumPy twin of :func:`xuracore.kernels.trapezoid.rotated_keys`."""
    count, rank = theta.shape[1], q.shape[2]
    groups = np.arange(head, head + count) // (dt.shape[2] // q.shape[3])
    for item, (b, start, tokens) in enumerate(places):
        if not tokens:
            continue
        speed, pace = _steps(rate, dt, b, start, head, count, tokens, radians)
        angle = np.mod(theta[item, :, None] + np.cumsum((speed * pace).astype(np.float64), axis=1), 2 * np.pi)
        theta[item] = angle[:, -1]
        c, s = cosine[item, :, :tokens], sine[item, :, :tokens]
        c[...], s[...] = np.cos(angle), np.sin(angle)
        for x, bias, out in ((q, q_bias, queries), (k, k_bias, keys)):
            rows = x[b, start : start + tokens][:, :, groups].transpose(2, 0, 1, 3) + bias[head : head + count, None]
            turned = rotate(rows, c[:, :, None], s[:, :, None], half)
            out[item, :, : tokens * rank] = turned.reshape(count, tokens * rank, -1)


def unrotated_keys_numpy(
    dqueries, dkeys, queries, keys, cosine, sine, rate, dt, places, head, half, radians,
    dtheta, gq, gk, gq_bias, gk_bias, grate, gdt,
):  # fmt: skip
    """NumPy twin of :func:`xuracore.kernels.trapezoid.unrotated_keys`."""
    count, rank, size = dtheta.shape[1], gq.shape[2], gq.shape[4]
    first, second = _pairs(size, cosine.shape[-1], half)
    heads, shared = slice(head, head + count), rate.shape[2] == 1
    for item, (b, start, tokens) in enumerate(places):
        if not tokens:
            continue
        speed, pace = _steps(rate, dt, b, start, head, count, tokens, radians)
        times, turn = slice(start, start + tokens), 0
        c, s = cosine[item, :, :tokens, None], sine[item, :, :tokens, None]
        for x, d, to, bias in ((queries, dqueries, gq, gq_bias), (keys, dkeys, gk, gk_bias)):
            x, d = (m[item, :, : tokens * rank].reshape(count, tokens, rank, size) for m in (x, d))
            turn = turn + (d[..., second] * x[..., first] - d[..., first] * x[..., second]).sum(axis=2)
            straight = rotate(d, c, -s, half)
            bias[heads] += straight.sum(axis=1)
            for u in range(count):
                to[b, times, :, (head + u) // (dt.shape[2] // gq.shape[3])] += straight[u]
        dangle = dtheta[item, :, None] + turn[:, ::-1].cumsum(axis=1)[:, ::-1]
        dtheta[item] = dangle[:, 0]
        spread = (dangle * pace).swapaxes(0, 1)
        grate[b, times, slice(None) if shared else heads] += spread.sum(axis=1, keepdims=True) if shared else spread
        gdt[b, times, heads] = 0 if radians else (dangle * speed).sum(axis=2).T


def previous_token_numpy(h, share, k_prev, values, state):
    """NumPy twin of :func:`xuracore.kernels.trapezoid.previous_token`."""
    state[...] = h + np.einsum("sh,srhn,srhp->shnp", share, k_prev, values)
