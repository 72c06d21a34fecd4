"""One token through a layer of Mamba-3 (arXiv 2603.15569): its projection, and its state.

With v_r = psi_r v for each rank r, keys and queries normalised, biased and turned by theta (see
:mod:`xuracore.ops.trapezoid`), per head::

    theta += pi tanh(angles) dt         alpha = exp(a dt)      gamma = lambda dt      lambda = sigmoid(trap)
    h = alpha (h + (dt - gamma) sum_r v'_r k'_r^T) + gamma sum_r v_r k_r^T             ' : of the token before
    y_r = h q_r + D v_r                 y = sum_r omega_r norm(y_r) silu(zeta_r z)

Projected numbers (B, …) are [z | v | k | q | dt | a | trap | angles], as ``in_proj`` has them.
"""

import numpy as np

from xuracore.jit import REDUCE, device, kernel, prange
from xuracore.kernels.decode import rms_norm_numpy, silu_numpy
from xuracore.kernels.fastmath import cosine_sine, exp, sigmoid, silu, softplus, tanh, wrap_angle
from xuracore.kernels.gemv import ZERO
from xuracore.kernels.trapezoid_numpy import rotate

ONE, PI = np.float32(1), np.float32(np.pi)


@device
def _normed_rows(x, start, count, weight, eps):
    """(B, count, N): rows of N numbers from ``start`` on, normalised unless eps is negative."""
    size = weight.size
    out = np.empty((x.shape[0], count, size), np.float32)
    for b in range(x.shape[0]):
        for i in range(count):
            row, into, total = x[b, start + i * size : start + (i + 1) * size], out[b, i], ZERO
            for n in range(size):
                total += row[n] * row[n]
            scale = ONE / np.sqrt(total / np.float32(size) + np.float32(eps)) if eps >= 0 else ONE
            for n in range(size):
                into[n] = row[n] * scale * weight[n]
    return out


@device
def _speeds(x, start, count):
    out = np.empty((x.shape[0], count), np.float32)
    for b in range(x.shape[0]):
        for n in range(count):
            out[b, n] = PI * tanh(x[b, start + n])
    return out


@device
def _turn(row, bias, cosine, sine, half, out):
    for n in range(out.size):
        out[n] = row[n] + bias[n]
    if half:
        first, second = out[: cosine.size], out[out.size // 2 :]
        for n in range(cosine.size):
            x, z = first[n], second[n]
            first[n] = x * cosine[n] - z * sine[n]
            second[n] = x * sine[n] + z * cosine[n]
    else:
        for n in range(cosine.size):
            x, z = out[2 * n], out[2 * n + 1]
            out[2 * n] = x * cosine[n] - z * sine[n]
            out[2 * n + 1] = x * sine[n] + z * cosine[n]


def mamba3_scan_numpy(
    projected, dt_bias, softplus_rate, a_floor, share, k_weight, q_weight, key_eps, k_bias, q_bias, half, skip,
    psi, zeta, omega, out_weight, out_eps, groups, theta, h, keys, values, y, tasks,
):  # fmt: skip
    (batch, heads, headdim, size), rank, inner = h.shape, keys.shape[1], y.shape[1]
    count, learned = rank * groups * size, heads * (share < 0)
    edges = np.cumsum([inner, inner, count, count, heads, heads, learned])
    z, v, k, q, step, forget, trap, angles = np.split(projected, edges, axis=1)
    dt = np.logaddexp(0, step + dt_bias).astype(np.float32)
    heavy = np.where(forget >= 0, 1 + forget, 1 / (1 - np.minimum(forget, 0)))
    rate = np.logaddexp(0, forget) if softplus_rate else heavy
    alpha = np.exp(-np.maximum(rate, np.float32(a_floor)) * dt)[:, :, None, None].astype(np.float32)
    gamma = dt * (0.5 * (1 + np.tanh(0.5 * trap)) if share < 0 else np.float32(share))
    turned = np.mod(theta + np.float32(np.pi) * np.tanh(angles)[:, None] * dt[:, :, None], np.float32(2 * np.pi))
    theta[...] = turned

    def ready(x, weight, bias):
        x = x.reshape(batch, rank, groups, size)
        x = rms_norm_numpy(x, weight, key_eps) if key_eps >= 0 else x * weight
        x = np.repeat(x, heads // groups, axis=2) + bias.swapaxes(0, 1)
        return rotate(x, np.cos(turned)[:, None], np.sin(turned)[:, None], bool(half))

    k, q, v = ready(k, k_weight, k_bias), ready(q, q_weight, q_bias), v.reshape(batch, heads, headdim)
    before = np.einsum("bh,hrp,bhp,brhn->bhpn", dt - gamma, psi, values, keys)
    h[...] = alpha * (h + before) + np.einsum("bh,hrp,bhp,brhn->bhpn", gamma, psi, v, k)
    keys[...], values[...] = k, v
    out = np.einsum("bhpn,brhn->bhrp", h, q) + skip[:, None, None] * psi * v[:, :, None]
    if out_eps >= 0:
        out = rms_norm_numpy(out, out_weight.reshape(heads, 1, headdim), out_eps)
    gate = silu_numpy(z.reshape(batch, heads, 1, headdim) * zeta)
    y[...] = (out * gate * omega).sum(axis=2).reshape(batch, inner)


@kernel(twin=mamba3_scan_numpy, parallel=True, fastmath=REDUCE)
def mamba3_scan(
    projected, dt_bias, softplus_rate, a_floor, share, k_weight, q_weight, key_eps, k_bias, q_bias, half, skip,
    psi, zeta, omega, out_weight, out_eps, groups, theta, h, keys, values, y, tasks,
):  # fmt: skip
    """theta (B, H, S), h (B, H, P, N), keys (B, R, H, N) and values (B, H, P) after the token; y (B, H P), gated.

    softplus_rate : 1 where a is -softplus, 0 where it is -heavy_tail.   share : lambda, negative where it is
    learned.   k_weight, q_weight (N), k_bias, q_bias (H, R, N), psi, zeta, omega (H, R, P), out_weight (H P).
    key_eps, out_eps : of the norms, negative for none.   half : the pairing of coordinates.
    """
    batch, heads, headdim, size = h.shape
    rank, turns, inner, per_group = keys.shape[1], theta.shape[2], y.shape[1], heads // groups
    key_at = 2 * inner
    step_at = key_at + 2 * rank * groups * size
    trap_at = step_at + 2 * heads
    k_rows = _normed_rows(projected, key_at, rank * groups, k_weight, key_eps)
    q_rows = _normed_rows(projected, key_at + rank * groups * size, rank * groups, q_weight, key_eps)
    speeds = _speeds(projected, trap_at + (heads if share < 0 else 0), turns)
    floor = np.float32(a_floor)
    for index in prange(tasks):
        task = np.int64(index)
        cosine, sine = np.empty(turns, np.float32), np.empty(turns, np.float32)
        new, query = np.empty((rank, size), np.float32), np.empty((rank, size), np.float32)
        out = np.empty((rank, headdim), np.float32)
        for b in range(batch):
            token = projected[b]
            for j in range(heads * task // tasks, heads * (task + 1) // tasks):
                dt, forget = softplus(token[step_at + j] + dt_bias[j]), token[step_at + heads + j]
                if softplus_rate:
                    rate = softplus(forget)
                else:
                    rate = ONE + forget if forget >= ZERO else ONE / (ONE - forget)
                alpha = exp(-max(rate, floor) * dt)
                gamma = dt * (sigmoid(token[trap_at + j]) if share < 0 else np.float32(share))
                behind, angle = alpha * (dt - gamma), theta[b, j]
                for n in range(turns):
                    angle[n] = wrap_angle(angle[n] + speeds[b, n] * dt)
                    cosine[n], sine[n] = cosine_sine(angle[n])
                for r in range(rank):
                    group = r * groups + j // per_group
                    _turn(k_rows[b, group], k_bias[j, r], cosine, sine, half, new[r])
                    _turn(q_rows[b, group], q_bias[j, r], cosine, sine, half, query[r])
                for p in range(headdim):
                    state, before, now = h[b, j, p], values[b, j, p], token[inner + j * headdim + p]
                    for r in range(rank):
                        keep = alpha if r == 0 else ONE
                        old, push = behind * psi[j, r, p] * before, gamma * psi[j, r, p] * now
                        was, key = keys[b, r, j], new[r]
                        for n in range(size):
                            state[n] = keep * state[n] + old * was[n] + push * key[n]
                    for r in range(rank):
                        asked, total = query[r], ZERO
                        for n in range(size):
                            total += state[n] * asked[n]
                        out[r, p] = total + skip[j] * psi[j, r, p] * now
                    values[b, j, p], y[b, j * headdim + p] = now, ZERO
                for r in range(rank):
                    kept, key, total = keys[b, r, j], new[r], ZERO
                    for n in range(size):
                        kept[n] = key[n]
                    for p in range(headdim):
                        total += out[r, p] * out[r, p]
                    scale = ONE
                    if out_eps >= 0:
                        scale /= np.sqrt(total / np.float32(headdim) + np.float32(out_eps))
                    for p in range(headdim):
                        at = j * headdim + p
                        gate = silu(token[at] * zeta[j, r, p]) * omega[j, r, p]
                        y[b, at] += out[r, p] * scale * out_weight[at] * gate
