"""Causal depthwise convolution over time with a carried state.

With the last ``K - 1`` inputs of the past as state, ``p = concatenate([state, x], axis=1)``:

    y[b, t, c] = bias[c] + Σ_k taps[k, c] p[b, t + k, c]

so that a sequence cut anywhere gives the same numbers as the whole.  ``taps`` is ``(K, C)``, the
transpose of the usual ``(C, K)`` weight: channels are adjacent in memory, and the inner loop runs
over them.  Everything is C-contiguous, of one float dtype; outputs are allocated by the caller.
"""

import numpy as np

from xuracore.jit import kernel, prange

CHANNELS = 128  # channels per backward block: wide enough for vector units, small enough for cache


def causal_conv_forward_numpy(x, state, taps, bias, y):
    """y (B, L, C) from x (B, L, C), state (B, K-1, C), taps (K, C), bias (C,)."""
    length = x.shape[1]
    padded = np.concatenate([state, x], axis=1)
    y[...] = bias
    for k, tap in enumerate(taps):
        y += tap * padded[:, k : k + length]


@kernel(twin=causal_conv_forward_numpy, parallel=True)
def causal_conv_forward(x, state, taps, bias, y):
    batch, length, channels = x.shape
    past = taps.shape[0] - 1
    for index in prange(batch * length):
        row = np.int64(index)
        b, t = row // length, row % length
        out, now, last = y[b, t], x[b, t], taps[past]
        for c in range(channels):
            out[c] = bias[c] + last[c] * now[c]
        for k in range(past):
            source, tap = t + k - past, taps[k]
            before = x[b, source] if source >= 0 else state[b, source + past]
            for c in range(channels):
                out[c] += tap[c] * before[c]


def causal_conv_backward_numpy(grad, x, state, taps, dx, dstate, dtaps, dbias):
    """Gradients of x, state, taps and bias for the gradient ``grad`` (B, L, C) of y."""
    length, past = x.shape[1], len(taps) - 1
    padded = np.concatenate([state, x], axis=1)
    spread = np.zeros_like(padded)
    for k, tap in enumerate(taps):
        spread[:, k : k + length] += tap * grad
        dtaps[k] = np.sum(padded[:, k : k + length] * grad, axis=(0, 1))
    dstate[...] = spread[:, :past]
    dx[...] = spread[:, past:]
    dbias[...] = np.sum(grad, axis=(0, 1))


@kernel(twin=causal_conv_backward_numpy, parallel=True)
def causal_conv_backward(grad, x, state, taps, dx, dstate, dtaps, dbias):
    batch, length, channels = x.shape
    past = taps.shape[0] - 1
    for block in prange((channels + CHANNELS - 1) // CHANNELS):
        low = np.int64(block) * CHANNELS
        high = min(low + CHANNELS, channels)
        dbias[low:high] = 0
        dtaps[:, low:high] = 0
        dstate[:, :, low:high] = 0
        for b in range(batch):
            for t in range(length):
                g, now, to_now = grad[b, t, low:high], x[b, t, low:high], dx[b, t, low:high]
                to_bias, to_tap, tap = dbias[low:high], dtaps[past, low:high], taps[past, low:high]
                for c in range(high - low):
                    to_bias[c] += g[c]
                    to_tap[c] += g[c] * now[c]
                    to_now[c] = g[c] * tap[c]
                for k in range(past):
                    at = t + k - past
                    to_tap, tap = dtaps[k, low:high], taps[k, low:high]
                    if at >= 0:
                        before, to_before = x[b, at, low:high], dx[b, at, low:high]
                    else:
                        before, to_before = state[b, at + past, low:high], dstate[b, at + past, low:high]
                    for c in range(high - low):
                        to_tap[c] += g[c] * before[c]
                        to_before[c] += g[c] * tap[c]
