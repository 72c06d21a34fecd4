"""The selective scan of Mamba-1 as one op, state in and state out."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels import selective_scan as selective
from xuracore.kernels import selective_scan_complex as complex_scan
from xuracore.ops.blocks import Spans, block_length, contiguous, sequences
from xuracore.ops.registry import primitive

SUMS_BYTES = 1 << 17  # of gradients of B and C that wait to be summed: so many that a call is worth a millisecond


def _selective_inputs(u, delta, a, b, c, skip, z, delta_bias, h, count):
    pair = (2,) if a.ndim == 3 else ()  # real and imaginary parts
    if u.ndim != 3 or a.ndim not in (2, 3) or a.shape[2:] != pair or b.ndim - len(pair) not in (3, 4):
        raise ShapeError(
            f"selective_scan: u {u.shape}, A {a.shape}, B {b.shape}; expected u (B, L, D), A (D, N), "
            "B (B, L, N) or (B, L, G, N); A and B with one more axis of 2 where A is complex"
        )
    b, c = (x[:, :, None] if x.ndim == 3 + len(pair) else x for x in (b, c))
    (batch, length, channels), size, groups = u.shape, a.shape[1], b.shape[2]
    if groups == 0 or channels % groups:
        raise ShapeError(f"selective_scan: {groups} groups do not divide {channels} channels")
    shapes = {
        "u": u.shape,
        "delta": u.shape,
        "A": (channels, size, *pair),
        "B": (batch, length, groups, size, *pair),
        "C": (batch, length, groups, size, *pair),
        "D": (channels,),
        "z": u.shape if z is not None else (0, 0, 0),
        "delta_bias": (channels,),
        "h": (count, channels, size, *pair) if h is not None else (0, 0, 0, *pair),
    }
    dense = []
    for (name, shape), x in zip(shapes.items(), (u, delta, a, b, c, skip, z, delta_bias, h)):
        if x is not None and x.shape != shape:
            raise ShapeError(f"selective_scan: {name} has shape {x.shape}; expected {shape}")
        x = contiguous(x, shape, u)
        in_time = name in ("u", "delta", "B", "C", "z")
        dense.append(x.reshape(shape[0] * shape[1], *shape[2:]) if in_time else x)
    return dense


def _selective_kernels(a):
    if a.ndim == 3:
        return complex_scan.complex_scan_forward, complex_scan.complex_scan_backward
    return selective.selective_scan_forward, selective.selective_scan_backward


def _selective_scan_forward(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None,
    *, delta_softplus=False, dt_limit=None, cu_seqlens=None,
):  # fmt: skip
    """The selective scan of Mamba-1 (arXiv 2312.00752); returns (y (B, L, D), last state (B, D, N)).

    u, delta, z (B, L, D); A (D, N), negative; B, C (B, L, G, N), or (B, L, N) for one group; D,
    delta_bias (D,); h (B, D, N) the state before the first token.  D, z, delta_bias and h may be
    None: no skip, no gate, no bias, a fresh start.
    A complex A is (D, N, 2), real and imaginary parts; then B and C are (B, L, G, N, 2) or (B, L, N, 2),
    h is (B, D, N, 2), and y = 2 Re sum C h: each number stands for a conjugate pair.
    delta_softplus : delta is given before softplus.   dt_limit : (low, high), where delta is clipped.
    cu_seqlens : (n + 1,), with B = 1: sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] of the row,
        and the states are (n, D, N).
    Raises ShapeError.
    """
    spans = Spans(u.shape, cu_seqlens, "selective_scan")
    inputs = _selective_inputs(u, delta, A, B, C, D, z, delta_bias, h, spans.count)
    tokens, channels = inputs[0].shape
    parts, (groups, size) = inputs[2].shape[2:], inputs[3].shape[1:3]
    scratch = 2 * inputs[2][0].size * selective.CHANNELS * u.itemsize  # a token's; a core's L2 holds 64
    block = block_length(spans.longest, scratch // 4)
    low, high = (-np.inf, np.inf) if dt_limit is None else dt_limit
    options = spans.edges, u.dtype.type(low), u.dtype.type(high), bool(delta_softplus), block
    y, last = np.empty((tokens, channels), u.dtype), np.empty((spans.count, channels, size, *parts), u.dtype)
    saved = inputs, options, [_states(inputs, options, y, last)], B.shape, C.shape, u.shape
    return (y.reshape(u.shape), last), saved


def _states(inputs, options, y, last):
    """Run the forward kernel; returns the states that it stored, (rows, channels)."""
    edges, block = options[0], options[-1]
    height = inputs[2][0].size  # rows of a state
    places = height * np.concatenate([[0], np.cumsum(_stored(edges, block))])
    states = np.empty((places[-1], y.shape[1]), y.dtype)
    tasks, work = selective.tasks(len(last), y.shape[1], inputs[3].shape[1]), 20 * y.size * height
    _selective_kernels(inputs[2])[0].split(tasks, work)(*inputs, *options, places, height, states, y, last)
    return states


def _stored(edges, block):
    """How many states of each sequence are stored: one before each block but the first."""
    return np.maximum(-(-np.diff(edges) // block) - 1, 0)


def _moved(states, edges, block, height, to):
    """Put stored states into ``to``, (tokens, channels), before their blocks; returns their (places, stride, array)."""
    if not len(states):
        return edges, height, states
    counts = _stored(edges, block)
    before = np.cumsum(counts) - counts
    if height > block:  # no room between two of them
        return height * before, height, states
    places = edges[:-1] + block - height
    rows = np.repeat(places - block * before, counts) + block * np.arange(counts.sum())
    to[(rows[:, None] + np.arange(height)).ravel()] = states
    return places, block, to


def _selective_scan_vjp(grad, saved, needs):
    """Beside the results there is room for little more than the sums of B's and C's gradients over runs of channels.

    The stored states are in the way only until the gradient of u has its memory: they move there, and theirs is
    freed.  A second backward pass finds none, and makes them again.  Sums exist for a few blocks at a time.
    """
    inputs, options, owned, b_shape, c_shape, shape = saved
    (u, _, a, b, _, _, z, _, h), edges, block = inputs, options[0], options[-1]
    (tokens, channels), groups, height, count = u.shape, b.shape[1], a[0].size, len(edges) - 1
    after = (count, *a.shape) if grad[1] is not None else (0,) * (a.ndim + 1)
    cotangents = [contiguous(g, form, u).reshape(form) for g, form in zip(grad, (u.shape, after))]
    states = owned.pop() if owned else _states(inputs, options, np.empty_like(u), np.empty((count, *a.shape), u.dtype))
    gu = np.empty_like(u)
    place = _moved(states, edges, block, height, gu)
    del states
    graw, gz = np.empty_like(u), np.empty_like(z)
    ga = np.zeros((count, *a.shape[1:], channels), u.dtype)
    gskip, gbias = (np.zeros((count, channels), u.dtype) for _ in range(2))
    gh_0 = np.empty(h.shape if len(needs) > 8 and needs[8] else (0,) * h.ndim, u.dtype)
    runs, tasks = selective.runs(channels, groups), selective.tasks(count, channels, groups)
    backward = _selective_kernels(a)[1]

    def run(begin, end, rows, total):
        call = backward.split(tasks, 60 * total * channels * height)
        call(*inputs, *options, *place, *cotangents, begin, end, rows, gu, graw, ga, *sums, gskip, gz, gbias, gh_0)
        return sums[:, 0, :total] if runs == 1 else sums[:, :, :total].sum(axis=1)

    lengths = np.diff(edges)
    blocks = -(-int(lengths.max(initial=0)) // block)
    step = max(1, SUMS_BYTES // max(1, 2 * runs * b[:1].nbytes * min(tokens, count * block)))
    if step >= blocks:
        sums = np.empty((2, runs, *b.shape), u.dtype)
        gb, gc = run(0, step, edges, tokens)
    else:
        gb, gc = np.empty_like(b), np.empty_like(b)
        sums = np.empty((2, runs, np.minimum(lengths, step * block).sum(), *b.shape[1:]), u.dtype)
        for begin in reversed(range(0, blocks, step)):
            openings = np.minimum(begin * block, lengths)
            taken = np.minimum(lengths - openings, step * block)
            rows = np.cumsum(taken) - taken
            here = np.repeat(edges[:-1] + openings - rows, taken) + np.arange(taken.sum())
            gb[here], gc[here] = run(begin, begin + step, rows, len(here))
    ga, gskip, gbias = (x[0] if count == 1 else x.sum(axis=0) for x in (ga, gskip, gbias))
    gu, graw, gz = (x.reshape(shape) if x.size == u.size else None for x in (gu, graw, gz))
    out = gu, graw, np.moveaxis(ga, -1, 0), gb.reshape(b_shape), gc.reshape(c_shape), gskip, gz, gbias, gh_0
    return out[: len(needs)]


def _selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, h=None,
    *, delta_softplus=False, dt_limit=None, cu_seqlens=None,
):  # fmt: skip
    """The defining recurrence, one sequence and token at a time."""
    batch, length, channels = u.shape
    delta = delta + (0 if delta_bias is None else delta_bias)
    delta = np.logaddexp(0, delta) if delta_softplus else delta
    delta = delta if dt_limit is None else np.clip(delta, *dt_limit)
    scale, pair = 1, A.ndim == 3
    if pair:
        scale, (A, B, C) = 2, (x[..., 0] + 1j * x[..., 1] for x in (A, B, C))
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))
    spans = sequences(u.shape, cu_seqlens, "selective_scan")
    last = np.zeros((len(spans), *A.shape), A.dtype)
    if h is not None:
        last += h[..., 0] + 1j * h[..., 1] if pair else h
    y = np.zeros(u.shape)
    for s, (row, start, stop) in enumerate(spans):
        for t in range(start, stop):
            step = delta[row, t, :, None]
            last[s] = np.exp(step * A) * last[s] + step * B[row, t] * u[row, t, :, None]
            y[row, t] = scale * (C[row, t] * last[s]).sum(axis=1).real + (0 if D is None else D * u[row, t])
    last = np.stack([last.real, last.imag], axis=-1) if pair else last
    return (y if z is None else y * z / (1 + np.exp(-z))), last


def _selective_scan_samples(rng):
    for batch, length, channels, size, groups, full, options in (
        (2, 5, 4, 3, 1, True, {}), (1, 4, 6, 2, 2, True, {"dt_limit": (0.5, 0.9)}), (2, 3, 3, 2, 0, False, {}),
        (1, 1, 1, 1, 1, False, {}), (1, 7, 3, 2, 1, True, {"cu_seqlens": np.array([0, 3, 3, 4, 7])}),
    ):  # fmt: skip
        normal = rng.standard_normal
        mixing = (batch, length, groups, size) if groups else (batch, length, size)
        inputs = [
            normal((batch, length, channels)), rng.uniform(0.1, 1, (batch, length, channels)),
            -rng.uniform(0.2, 2, (channels, size)), normal(mixing), normal(mixing),
        ]  # fmt: skip
        if full:
            inputs += [normal(channels), normal((batch, length, channels)), normal(channels)]
            inputs += [normal((len(options.get("cu_seqlens", range(batch + 1))) - 1, channels, size))]
        yield tuple(inputs), {"delta_softplus": full, **options}
    normal = rng.standard_normal
    yield (
        normal((2, 4, 4)), rng.uniform(0.1, 1, (2, 4, 4)),
        np.stack([-rng.uniform(0.2, 2, (4, 2)), 3 * normal((4, 2))], axis=-1), normal((2, 4, 2, 2, 2)),
        normal((2, 4, 2, 2, 2)), normal(4), normal((2, 4, 4)), normal(4), normal((2, 4, 2, 2)),
    ), {"delta_softplus": True}
    yield (
        normal((1, 5, 2)), rng.uniform(0.1, 1, (1, 5, 2)), -rng.uniform(0.2, 2, (2, 3, 2)),
        normal((1, 5, 3, 2)), normal((1, 5, 3, 2)),
    ), {"cu_seqlens": np.array([0, 2, 5]), "dt_limit": (0.3, 0.8)}


selective_scan = primitive(
    "selective_scan", _selective_scan_forward, _selective_scan_vjp,
    reference=_selective_scan_reference, samples=_selective_scan_samples, outputs=2, tolerance=1e-4,
)  # fmt: skip
