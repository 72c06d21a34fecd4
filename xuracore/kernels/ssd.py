"""The elementwise half of the chunked scan of Mamba-2 and Mamba-3; matrix products are the other half.

For one sequence and one head the scan is (arXiv 2405.21060; 2603.15569 for the two weights)::

    H_t = e^{l_t} H_{t-1} + s_t sum_r k_{t,r} v_{t,r}^T                                (N, P)
    y_{t,r} = e^{l_t} H_{t-1}^T q_{t,r} + sum_u (gamma_t q_{t,r} . k_{t,u} + D [r = u]) v_{t,u}

Mamba-2 has s = gamma = dt and one rank.  A chunk of Q tokens with entering state S, and c the running
sum of l inside the chunk, is one product ``Y = A X`` of::

    A = [ e^{c_i} q_i | W ]      W_ij = e^{c_i - c_j} s_j q_i . k_j  for tokens j < i,
    X = [ S ; v ]                       gamma_i q_i . k_j + D [i = j] within a token, 0 above
    S' = e^{c_Q} S + k^T (w v)   w_j = e^{c_Q - c_j} s_j

so the products run at the speed of BLAS, and what is here fills A and X, and takes the gradients apart.
A row is a token and a rank, ranks of a token side by side.  c is summed in float64: its differences
would lose digits where the decay is strong.

Shapes: v ``(B, L * R, H, P)``; l, s, gamma ``(B, L, H)``; skip ``(H,)``.  Each call does heads
``head … head + U`` of tokens ``start … start + Q`` of sequence ``b``.  q, k ``(U or 1, rows, N)`` hold the
rows of these tokens, one of them where the heads share a group; products ``(U or 1, rows, rows)`` is q k^T.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel
from xuracore.kernels.fastmath import exp


def _chunk(log_decay, gain, b, start, head, count, tokens, rank):
    """c, e^{c_i - c_j} (lower triangle, else 0) and w, by head and row."""
    part = np.s_[b, start : start + tokens, head : head + count]
    total = np.cumsum(log_decay[part].astype(np.float64), axis=0).T
    rise = np.repeat(np.repeat(total[:, :, None] - total[:, None, :], rank, axis=1), rank, axis=2)
    token = np.repeat(np.arange(tokens), rank)
    decay = np.where(token[:, None] >= token, np.exp(np.minimum(rise, 0)), 0).astype(gain.dtype)
    s = np.repeat(gain[part].T, rank, axis=1)
    return np.repeat(total, rank, axis=1), decay, s, decay[:, -1] * s, token[:, None] == token


def ssd_chunk_numpy(
    q, v, log_decay, gain, own, skip, b, start, head, tokens, products, a, x, entering, total
):  # fmt: skip
    """NumPy twin of :func:`ssd_chunk`."""
    count, (_, rows, size) = len(a), q.shape
    rank = rows // tokens
    c, decay, s, w, same = _chunk(log_decay, gain, b, start, head, count, tokens, rank)
    at = slice(start * rank, start * rank + rows)
    g = np.repeat(own[b, start : start + tokens, head : head + count].T, rank, axis=1)[:, :, None]
    weights = np.where(same, g, decay * s[:, None, :]) * products
    a[:, :rows, :size] = np.exp(c)[:, :, None] * q
    a[:, :rows, size : size + rows] = weights + np.eye(rows) * skip[head : head + count, None, None]
    x[:, size : size + rows] = v[b, at, head : head + count].swapaxes(0, 1)
    entering[:, :rows] = w[:, :, None] * x[:, size : size + rows]
    total[...] = np.exp(c[:, -1])


@kernel(twin=ssd_chunk_numpy)
def ssd_chunk(
    q, v, log_decay, gain, own, skip, b, start, head, tokens, products, a, x, entering, total
):  # fmt: skip
    """Fill A, the lower part of X, w v and e^{c_Q} for U heads of a chunk.

    a ``(U, rows or more, N + rows or more)``, x ``(U, N + rows or more, P)``, entering
    ``(U, rows or more, P)``, total ``(U,)``.
    """
    (each, rows, size), width = q.shape, v.shape[3]
    rank = rows // tokens
    number = q.dtype.type
    zero = number(0)
    c, s = np.empty(tokens, np.float64), np.empty(tokens, q.dtype)
    weight, rise = np.empty(rows, q.dtype), np.empty(tokens, q.dtype)
    for u in range(a.shape[0]):
        h = head + u
        slot = u if each > 1 else 0
        scores = products[slot]
        running = 0.0
        for i in range(tokens):
            running += np.float64(log_decay[b, start + i, h])
            c[i] = running
            s[i] = gain[b, start + i, h]
        for i in range(tokens):
            near, now = exp(number(c[i])), c[i]
            for j in range(i):
                rise[j] = exp(number(min(now - c[j], 0.0))) * s[j]
            if rank == 1:
                for j in range(i):
                    weight[j] = rise[j]
            else:
                for j in range(i):
                    for r in range(rank):
                        weight[j * rank + r] = rise[j]
            for r in range(rank):
                row = i * rank + r
                source, target, out, score = q[slot, row], a[u, row], a[u, row, size:], scores[row]
                for n in range(size):
                    target[n] = near * source[n]
                for j in range(i * rank):
                    out[j] = weight[j] * score[j]
                for j in range(i * rank, (i + 1) * rank):
                    out[j] = own[b, start + i, h] * score[j]
                out[row] += skip[h]
                for j in range((i + 1) * rank, rows):
                    out[j] = zero
        total[u] = exp(number(c[tokens - 1]))
        for i in range(tokens):
            w = exp(number(min(c[tokens - 1] - c[i], 0.0))) * s[i]
            for r in range(rank):
                row = i * rank + r
                source, low, scaled = v[b, start * rank + row, h], x[u, size + row], entering[u, row]
                for p in range(width):
                    low[p] = source[p]
                    scaled[p] = w * source[p]


def ssd_chunk_gradient_numpy(
    v, log_decay, gain, own, b, start, head, tokens, products, a, x, grad,
    da, dx, back, dkeys, dproducts, dq, dk, gv, glog_decay, ggain, gown, gskip,
):  # fmt: skip
    """NumPy twin of :func:`ssd_chunk_gradient`."""
    count, size, rows = len(a), a.shape[2] - a.shape[1], products.shape[1]
    rank = rows // tokens
    part = np.s_[b, start : start + tokens, head : head + count]
    c, decay, s, w, same = _chunk(log_decay, gain, b, start, head, count, tokens, rank)
    e = da[:, :rows, size : size + rows]
    g = np.repeat(own[part].T, rank, axis=1)[:, :, None]
    low = np.where(same, 0, decay)
    dscores = np.where(same, g * e, low * s[:, None, :] * e)
    dqs = np.exp(c)[:, :, None] * da[:, :rows, :size]
    shared = len(products) < count
    dproducts[:, :rows, :rows] = dscores.sum(axis=0) if shared else dscores
    dq[:, :rows] = dqs.sum(axis=0) if shared else dqs
    dk[:, :rows] = dkeys[:, :rows].sum(axis=0) if shared else dkeys[:, :rows]
    values = x[:, size : size + rows]
    along = np.einsum("urp,urp->ur", values, back[:, :rows])
    at = slice(start * rank, start * rank + rows)
    gv[b, at, head : head + count] = (dx[:, size : size + rows] + w[:, :, None] * back[:, :rows]).swapaxes(0, 1)

    def by_token(rowwise):
        return rowwise.reshape(count, tokens, rank).sum(axis=2)

    ggain[part] = by_token((low * products * e).sum(axis=1) + decay[:, -1] * along).T
    gown[part] = by_token(np.where(same, products * e, 0).sum(axis=2)).T
    gskip[head : head + count] += np.einsum("uii->u", e)
    flow = (low * s[:, None, :] * products * e).reshape(count, tokens, rank, tokens, rank).sum(axis=(2, 4))
    before = np.cumsum(flow, axis=2) - flow  # over j < t
    intra = np.stack([before[:, t:, t].sum(axis=1) for t in range(tokens)], axis=1)
    out = by_token(np.einsum("urn,urn->ur", a[:, :rows, :size], da[:, :rows, :size]))
    into = by_token(w * along)
    kept = np.exp(c[:, -1]) * np.einsum("unp,unp->u", grad, x[:, :size])
    glog_decay[part] = (
        intra + out[:, ::-1].cumsum(axis=1)[:, ::-1] + into.cumsum(axis=1) - into + kept[:, None]
    ).T


@kernel(twin=ssd_chunk_gradient_numpy, fastmath=REDUCE)
def ssd_chunk_gradient(
    v, log_decay, gain, own, b, start, head, tokens, products, a, x, grad,
    da, dx, back, dkeys, dproducts, dq, dk, gv, glog_decay, ggain, gown, gskip,
):  # fmt: skip
    """Gradients of the elementwise half, from those of the products.

    grad ``(U, N, P)`` is that of S'; da = dY X^T, dx = A^T dY, back = k grad, dkeys = (w v) grad^T.
    Writes dproducts, dq and dk (what reaches q and k without passing q k^T), summed over the heads
    if they share a group; gv, glog_decay, ggain, gown at their places; adds to gskip.
    """
    size, width = a.shape[2] - a.shape[1], v.shape[3]
    number = v.dtype.type
    zero = number(0)
    rows = products.shape[1]
    rank = rows // tokens
    c, s, rise = np.empty(tokens, np.float64), np.empty(tokens, v.dtype), np.empty(tokens, v.dtype)
    weight, flow = np.empty(rows, v.dtype), np.empty(tokens, v.dtype)
    dlog, dgain = np.empty(tokens, v.dtype), np.empty(tokens, v.dtype)
    out, into = np.empty(tokens, v.dtype), np.empty(tokens, v.dtype)
    for u in range(a.shape[0]):
        h = head + u
        each = products.shape[0] > 1
        slot = u if each else 0
        scores = products[slot]
        fresh = each or u == 0
        running = 0.0
        for i in range(tokens):
            running += np.float64(log_decay[b, start + i, h])
            c[i] = running
            s[i] = gain[b, start + i, h]
            dlog[i] = zero
            dgain[i] = zero
        dskip = zero
        for i in range(tokens):
            near, now = exp(number(c[i])), c[i]
            for j in range(i):
                rise[j] = exp(number(min(now - c[j], 0.0)))
                flow[j] = zero
            if rank > 1:
                for j in range(i):
                    for r in range(rank):
                        weight[j * rank + r] = rise[j]
            down, dnear = zero, zero
            for r in range(rank):
                row = i * rank + r
                e, score, to_scores = da[u, row, size:], scores[row], dproducts[slot, row]
                if fresh:
                    for j in range(rows):
                        to_scores[j] = zero
                if rank == 1:
                    for j in range(i):
                        x_j = rise[j] * e[j]
                        flow[j] = x_j * score[j]
                        to_scores[j] += x_j * s[j]
                else:
                    for j in range(i):
                        for o in range(j * rank, (j + 1) * rank):
                            x_j = weight[o] * e[o]
                            flow[j] += x_j * score[o]
                            to_scores[o] += x_j * s[j]
                for j in range(i * rank, (i + 1) * rank):
                    to_scores[j] += own[b, start + i, h] * e[j]
                    down += score[j] * e[j]
                dskip += e[row]
                source, scaled, target = da[u, row], a[u, row], dq[slot, row]
                key, to_key = dkeys[u, row], dk[slot, row]
                if fresh:
                    for n in range(size):
                        target[n] = near * source[n]
                        to_key[n] = key[n]
                else:
                    for n in range(size):
                        target[n] += near * source[n]
                        to_key[n] += key[n]
                for n in range(size):
                    dnear += source[n] * scaled[n]
            out[i] = dnear
            gown[b, start + i, h] = down
            before = zero
            for j in range(i):
                dgain[j] += flow[j]
                dlog[j] += before
                before += flow[j] * s[j]
            dlog[i] += before
        gskip[h] += dskip
        for i in range(tokens):
            far = exp(number(min(c[tokens - 1] - c[i], 0.0)))
            w = far * s[i]
            along = zero
            for r in range(rank):
                row = i * rank + r
                value, behind, direct = x[u, size + row], back[u, row], dx[u, size + row]
                target = gv[b, start * rank + row, h]
                for p in range(width):
                    along += value[p] * behind[p]
                    target[p] = direct[p] + w * behind[p]
            ggain[b, start + i, h] = dgain[i] + far * along
            into[i] = w * along
        kept = zero
        for n in range(size):
            for p in range(width):
                kept += grad[u, n, p] * x[u, n, p]
        kept *= exp(number(c[tokens - 1]))
        for i in range(tokens):
            glog_decay[b, start + i, h] = dlog[i] + kept
            kept += into[i]
        after = zero
        for back_i in range(tokens):
            i = tokens - 1 - back_i
            after += out[i]
            glog_decay[b, start + i, h] += after


def ssd_steps_numpy(q, k, v, log_decay, gain, own, skip, b, start, head, tokens, state, y):
    """NumPy twin of :func:`ssd_steps`."""
    count, rank = len(state), q.shape[1] // tokens
    heads = slice(head, head + count)
    for i in range(tokens):
        t, rows = start + i, slice((start + i) * rank, (start + i + 1) * rank)
        values = v[b, rows, heads].swapaxes(0, 1)
        queries, keys = (x[:, i * rank : (i + 1) * rank] for x in (q, k))
        state *= np.exp(log_decay[b, t, heads])[:, None, None]
        weights = own[b, t, heads, None, None] * (queries @ keys.swapaxes(1, 2))
        weights = weights + np.eye(rank, dtype=v.dtype) * skip[heads, None, None]
        y[b, rows, heads] = (queries @ state + weights @ values).swapaxes(0, 1)
        state += gain[b, t, heads, None, None] * (keys.swapaxes(1, 2) @ values)


@kernel(twin=ssd_steps_numpy, fastmath=REDUCE)
def ssd_steps(q, k, v, log_decay, gain, own, skip, b, start, head, tokens, state, y):
    """The recurrence token by token: writes these tokens' y, and ``state`` (U, N, P) in place."""
    (each, rows, size), width = q.shape, v.shape[3]
    rank = rows // tokens
    number = q.dtype.type
    zero = number(0)
    for u in range(state.shape[0]):
        h = head + u
        slot = u if each > 1 else 0
        for i in range(tokens):
            t = start + i
            decay, push = exp(log_decay[b, t, h]), gain[b, t, h]
            for r in range(rank):
                out = y[b, t * rank + r, h]
                for p in range(width):
                    out[p] = zero
                for o in range(rank):
                    weight = skip[h] if r == o else zero
                    dot = zero
                    for n in range(size):
                        dot += q[slot, i * rank + r, n] * k[slot, i * rank + o, n]
                    weight += own[b, t, h] * dot
                    value = v[b, t * rank + o, h]
                    for p in range(width):
                        out[p] += weight * value[p]
            for n in range(size):
                line = state[u, n]
                for p in range(width):
                    line[p] *= decay
                for r in range(rank):
                    out, weight = y[b, t * rank + r, h], q[slot, i * rank + r, n]
                    for p in range(width):
                        out[p] += weight * line[p]
                for r in range(rank):
                    value, weight = v[b, t * rank + r, h], push * k[slot, i * rank + r, n]
                    for p in range(width):
                        line[p] += weight * value[p]
