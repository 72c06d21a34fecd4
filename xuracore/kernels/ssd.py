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
``head … head + U`` of m pieces of at most Q tokens, ``places`` (m, 3): row of the batch, first token, tokens.
q, k ``(m, U or 1, rows, N)`` hold the rows of these tokens, one of them where the heads share a group;
products ``(m, U or 1, rows, rows)`` is q k^T.  Pieces may be shorter than ``rows`` says: what lies behind their
rows is not touched, so that zeros there stay.
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


def ssd_chunk_numpy(q, v, log_decay, gain, own, skip, places, head, products, a, x, entering, total):
    """NumPy twin of :func:`ssd_chunk`."""
    count, size, rank = a.shape[1], q.shape[3], v.shape[1] // gain.shape[1]
    for item, (b, start, tokens) in enumerate(places):
        rows = tokens * rank
        ends = size + rows
        c, decay, s, w, same = _chunk(log_decay, gain, b, start, head, count, tokens, rank)
        at = slice(start * rank, start * rank + rows)
        g = np.repeat(own[b, start : start + tokens, head : head + count].T, rank, axis=1)[:, :, None]
        weights = np.where(same, g, decay * s[:, None, :]) * products[item, :, :rows, :rows]
        a[item, :, :rows, :size] = np.exp(c)[:, :, None] * q[item, :, :rows]
        a[item, :, :rows, size:ends] = weights + np.eye(rows) * skip[head : head + count, None, None]
        x[item, :, size:ends] = v[b, at, head : head + count].swapaxes(0, 1)
        entering[item, :, :rows] = w[:, :, None] * x[item, :, size:ends]
        total[item] = np.exp(c[:, -1])


@kernel(twin=ssd_chunk_numpy)
def ssd_chunk(q, v, log_decay, gain, own, skip, places, head, products, a, x, entering, total):
    """Fill A, the lower part of X, w v and e^{c_Q} for U heads of m pieces.

    a ``(m, U, rows, N + rows)``, x ``(m, U, N + rows, P)``, entering ``(m, U, rows, P)``, total ``(m, U)``.
    """
    (_, each, most, size), width = q.shape, v.shape[3]
    rank = v.shape[1] // gain.shape[1]
    number = q.dtype.type
    zero = number(0)
    c, s, rise = np.empty(most, np.float64), np.empty(most, q.dtype), np.empty(most, q.dtype)
    weight = np.empty(most, q.dtype)
    count = a.shape[1]
    for task in range(a.shape[0] * count):
        item, u = task // count, task % count
        h, slot = head + u, u if each > 1 else 0
        b, start, tokens = places[item, 0], places[item, 1], places[item, 2]
        rows = tokens * rank
        scores, near_keys, low_part, far_values = products[item, slot], a[item, u], x[item, u], entering[item, u]
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
                source, target, score = q[item, slot, row], near_keys[row], scores[row]
                out = near_keys[row, size:]
                for n in range(size):
                    target[n] = near * source[n]
                for j in range(i * rank):
                    out[j] = weight[j] * score[j]
                for j in range(i * rank, (i + 1) * rank):
                    out[j] = own[b, start + i, h] * score[j]
                out[row] += skip[h]
                for j in range((i + 1) * rank, rows):
                    out[j] = zero
        total[item, u] = exp(number(running))
        for i in range(tokens):
            w = exp(number(min(running - c[i], 0.0))) * s[i]
            for r in range(rank):
                row = i * rank + r
                source, low, scaled = v[b, start * rank + row, h], low_part[size + row], far_values[row]
                for p in range(width):
                    low[p] = source[p]
                    scaled[p] = w * source[p]


def ssd_chunk_gradient_numpy(
    v, log_decay, gain, own, places, head, products, a, x, grad,
    da, dx, back, dkeys, dproducts, dq, dk, gv, glog_decay, ggain, gown, gskip,
):  # fmt: skip
    """NumPy twin of :func:`ssd_chunk_gradient`."""
    count, size, rank = a.shape[1], grad.shape[2], v.shape[1] // gain.shape[1]
    shared = products.shape[1] < count
    for item, (b, start, tokens) in enumerate(places):
        rows = tokens * rank
        ends = size + rows
        part = np.s_[b, start : start + tokens, head : head + count]
        c, decay, s, w, same = _chunk(log_decay, gain, b, start, head, count, tokens, rank)
        scores, e = products[item, :, :rows, :rows], da[item, :, :rows, size:ends]
        g = np.repeat(own[part].T, rank, axis=1)[:, :, None]
        low = np.where(same, 0, decay)
        dscores = np.where(same, g * e, low * s[:, None, :] * e)
        dqs, dks = np.exp(c)[:, :, None] * da[item, :, :rows, :size], dkeys[item, :, :rows]
        dproducts[item, :, :rows, :rows] = dscores.sum(axis=0) if shared else dscores
        dq[item, :, :rows] = dqs.sum(axis=0) if shared else dqs
        dk[item, :, :rows] = dks.sum(axis=0) if shared else dks
        values, behind = x[item, :, size:ends], back[item, :, :rows]
        along = np.einsum("urp,urp->ur", values, behind)
        at = slice(start * rank, start * rank + rows)
        gv[b, at, head : head + count] = (dx[item, :, size:ends] + w[:, :, None] * behind).swapaxes(0, 1)

        def by_token(rowwise):
            return rowwise.reshape(count, tokens, rank).sum(axis=2)

        ggain[part] = by_token((low * scores * e).sum(axis=1) + decay[:, -1] * along).T
        gown[part] = by_token(np.where(same, scores * e, 0).sum(axis=2)).T
        gskip[head : head + count] += np.einsum("uii->u", e)
        flow = (low * s[:, None, :] * scores * e).reshape(count, tokens, rank, tokens, rank).sum(axis=(2, 4))
        before = np.cumsum(flow, axis=2) - flow  # over j < t
        intra = np.stack([before[:, t:, t].sum(axis=1) for t in range(tokens)], axis=1)
        out = by_token(np.einsum("urn,urn->ur", a[item, :, :rows, :size], da[item, :, :rows, :size]))
        into = by_token(w * along)
        kept = np.exp(c[:, -1]) * np.einsum("unp,unp->u", grad[item], x[item, :, :size])
        glog_decay[part] = (
            intra + out[:, ::-1].cumsum(axis=1)[:, ::-1] + into.cumsum(axis=1) - into + kept[:, None]
        ).T


@kernel(twin=ssd_chunk_gradient_numpy, fastmath=REDUCE)
def ssd_chunk_gradient(
    v, log_decay, gain, own, places, head, products, a, x, grad,
    da, dx, back, dkeys, dproducts, dq, dk, gv, glog_decay, ggain, gown, gskip,
):  # fmt: skip
    """Gradients of the elementwise half, from those of the products.

    grad ``(m, U, N, P)`` is that of S'; da = dY X^T, dx = A^T dY, back = k grad, dkeys = (w v) grad^T.
    Writes dproducts, dq and dk (what reaches q and k without passing q k^T), summed over the heads
    if they share a group; gv, glog_decay, ggain, gown at their places; adds to gskip.
    """
    size, most, width = grad.shape[2], products.shape[2], v.shape[3]
    rank = v.shape[1] // gain.shape[1]
    number = v.dtype.type
    zero = number(0)
    c, s, rise = np.empty(most, np.float64), np.empty(most, v.dtype), np.empty(most, v.dtype)
    weight, flow = np.empty(most, v.dtype), np.empty(most, v.dtype)
    dlog, dgain = np.empty(most, v.dtype), np.empty(most, v.dtype)
    out, into = np.empty(most, v.dtype), np.empty(most, v.dtype)
    count, each = a.shape[1], products.shape[1] > 1
    for task in range(a.shape[0] * count):
        item, u = task // count, task % count
        h, slot = head + u, u if each else 0
        b, start, tokens = places[item, 0], places[item, 1], places[item, 2]
        rows = tokens * rank
        scores, near_keys, values, to_values = products[item, slot], a[item, u], x[item, u], dx[item, u]
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
                source, score, to_scores = da[item, u, row], scores[row], dproducts[item, slot, row]
                e = source[size:]
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
                scaled, target = near_keys[row], dq[item, slot, row]
                key, to_key = dkeys[item, u, row], dk[item, slot, row]
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
                value, behind, direct = values[size + row], back[item, u, row], to_values[size + row]
                target = gv[b, start * rank + row, h]
                for p in range(width):
                    along += value[p] * behind[p]
                    target[p] = direct[p] + w * behind[p]
            ggain[b, start + i, h] = dgain[i] + far * along
            into[i] = w * along
        kept = zero
        for n in range(size):
            for p in range(width):
                kept += grad[item, u, n, p] * values[n, p]
        kept *= exp(number(c[tokens - 1]))
        for i in range(tokens):
            glog_decay[b, start + i, h] = dlog[i] + kept
            kept += into[i]
        after = zero
        for back_i in range(tokens):
            i = tokens - 1 - back_i
            after += out[i]
            glog_decay[b, start + i, h] += after


def ssd_steps_numpy(q, k, v, log_decay, gain, own, skip, places, head, state, y):
    """NumPy twin of :func:`ssd_steps`."""
    count, rank = state.shape[1], v.shape[1] // gain.shape[1]
    heads = slice(head, head + count)
    for item, (b, start, tokens) in enumerate(places):
        for i in range(tokens):
            t, rows = start + i, slice((start + i) * rank, (start + i + 1) * rank)
            values = v[b, rows, heads].swapaxes(0, 1)
            queries, keys = (x[item, :, i * rank : (i + 1) * rank] for x in (q, k))
            state[item] *= np.exp(log_decay[b, t, heads])[:, None, None]
            weights = own[b, t, heads, None, None] * (queries @ keys.swapaxes(1, 2))
            weights = weights + np.eye(rank, dtype=v.dtype) * skip[heads, None, None]
            y[b, rows, heads] = (queries @ state[item] + weights @ values).swapaxes(0, 1)
            state[item] += gain[b, t, heads, None, None] * (keys.swapaxes(1, 2) @ values)


@kernel(twin=ssd_steps_numpy, fastmath=REDUCE)
def ssd_steps(q, k, v, log_decay, gain, own, skip, places, head, state, y):
    """The recurrence token by token: writes these tokens' y, and ``state`` (m, U, N, P) in place."""
    each, size, width = q.shape[1], q.shape[3], v.shape[3]
    rank = v.shape[1] // gain.shape[1]
    number = q.dtype.type
    zero = number(0)
    count = state.shape[1]
    for task in range(state.shape[0] * count):
        item, u = task // count, task % count
        h, slot = head + u, u if each > 1 else 0
        b, start, tokens = places[item, 0], places[item, 1], places[item, 2]
        queries, keys, carried = q[item, slot], k[item, slot], state[item, u]
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
                        dot += queries[i * rank + r, n] * keys[i * rank + o, n]
                    weight += own[b, t, h] * dot
                    value = v[b, t * rank + o, h]
                    for p in range(width):
                        out[p] += weight * value[p]
            for n in range(size):
                line = carried[n]
                for p in range(width):
                    line[p] *= decay
                for r in range(rank):
                    out, weight = y[b, t * rank + r, h], queries[i * rank + r, n]
                    for p in range(width):
                        out[p] += weight * line[p]
                for r in range(rank):
                    value, weight = v[b, t * rank + r, h], push * keys[i * rank + r, n]
                    for p in range(width):
                        line[p] += weight * value[p]
