"""Causal depthwise convolution over time with a carried state.

With the last ``K - 1`` inputs of the past as state, ``p = concatenate([state, x], axis=1)``:

    y[b, t, c] = bias[c] + Σ_k taps[k, c] p[b, t + k, c]

so that a sequence cut anywhere gives the same numbers as the whole.  ``taps`` is ``(K, C)``, the
transpose of the usual ``(C, K)`` weight: channels are adjacent in memory, and the inner loop runs
over them.  Everything is C-contiguous, of one float dtype; outputs are allocated by the caller.
"""

import numpy as np

from xuracore.jit import kernel, prange

CHANNELS = 64  # channels per backward block: wide enough for vector units, small enough for cache


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
    size = taps.shape[0]
    past = size - 1
    for row in prange(batch * length):
        b = np.int64(row) // length
        t = np.int64(row) % length
        for c in range(channels):
            y[b, t, c] = bias[c] + taps[past, c] * x[b, t, c]
        for k in range(past):
            source = t + k - past
            if source >= 0:
                for c in range(channels):
                    y[b, t, c] += taps[k, c] * x[b, source, c]
            else:
                for c in range(channels):
                    y[b, t, c] += taps[k, c] * state[b, source + past, c]


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
    zero = x.dtype.type(0)
    for block in prange((channels + CHANNELS - 1) // CHANNELS):
        low = np.int64(block) * CHANNELS
        high = min(low + CHANNELS, channels)
        for c in range(low, high):
            dbias[c] = zero
        for k in range(past + 1):
            for c in range(low, high):
                dtaps[k, c] = zero
        for b in range(batch):
            for s in range(past):
                for c in range(low, high):
                    dstate[b, s, c] = zero
            for t in range(length):
                for c in range(low, high):
                    dbias[c] += grad[b, t, c]
                    dtaps[past, c] += grad[b, t, c] * x[b, t, c]
                    dx[b, t, c] = grad[b, t, c] * taps[past, c]
                for k in range(past):
                    source = t + k - past
                    if source >= 0:
                        for c in range(low, high):
                            dtaps[k, c] += grad[b, t, c] * x[b, source, c]
                            dx[b, source, c] += grad[b, t, c] * taps[k, c]
                    else:
                        for c in range(low, high):
                            dtaps[k, c] += grad[b, t, c] * state[b, source + past, c]
                            dstate[b, source + past, c] += grad[b, t, c] * taps[k, c]
