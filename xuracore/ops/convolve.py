"""Causal depthwise convolution with a carried state; see :mod:`xuracore.kernels.conv`."""

import numpy as np

from xuracore.errors import ShapeError
from xuracore.kernels import activation, conv
from xuracore.ops.arrays import contiguous, floating, vector
from xuracore.ops.registry import primitive


def _causal_conv1d_forward(x, weight, bias=None, state=None, silu=False):
    """Causal depthwise convolution over time → (y (B, L, C), new state (B, K-1, C)).

    y[b, t, c] = bias[c] + Σ_k weight[c, k] p[b, t + k, c] with p the state followed by x.

    x (B, L, C); weight (C, K) (or (C, 1, K), as checkpoints store it); bias (C,) or None.
    state : the last K - 1 inputs of the past, or None for zeros.   silu : apply silu to y.
    """
    x = contiguous(floating(x))
    weight = np.asarray(weight)
    if x.ndim != 3 or weight.ndim not in (2, 3) or weight.size != weight.shape[0] * weight.shape[-1]:
        raise ShapeError(f"causal_conv1d: x {x.shape} is to be (B, L, C), weight {weight.shape} (C, [1,] K)")
    batch, _, channels = x.shape
    size = weight.shape[-1]
    if weight.shape[0] != channels or size < 1:
        raise ShapeError(f"causal_conv1d: weight {weight.shape} does not fit {channels} channels")
    taps = contiguous(weight.reshape(channels, size).T, dtype=x.dtype)
    shift = vector(bias, channels, x.dtype, 0, "bias")
    if state is None:
        state = np.zeros((batch, size - 1, channels), x.dtype)
    elif np.shape(state) != (batch, size - 1, channels):
        expected = batch, size - 1, channels
        raise ShapeError(f"causal_conv1d: state has shape {np.shape(state)}; expected {expected}")
    state = contiguous(state, dtype=x.dtype)
    y = before = _convolve(x, state, taps, shift)
    if silu:
        y = np.empty_like(before)
        activation.silu_forward.sized(8 * y.size)(before.reshape(-1), y.reshape(-1))
    tail = x[:, max(x.shape[1] - size + 1, 0) :]
    new_state = np.concatenate([state[:, tail.shape[1] :], tail], axis=1)
    return (y, new_state), (x, state, taps, shift, silu, weight.shape)


def _convolve(x, state, taps, shift):
    y = np.empty_like(x)
    conv.causal_conv_forward.sized(2 * x.size * len(taps))(x, state, taps, shift, y)
    return y


def _causal_conv1d_vjp(grad, saved, needs):
    to_y, to_state = grad
    x, state, taps, shift, silu, shape = saved
    g = np.zeros_like(x) if to_y is None else contiguous(to_y)
    if silu:  # the sum before silu is cheaper to compute again than to keep
        before = _convolve(x, state, taps, shift).reshape(-1)
        through = np.empty_like(before)
        activation.silu_backward.sized(8 * x.size)(g.reshape(-1), before, through)
        g = through.reshape(x.shape)
    dx, dstate, dtaps, dshift = (np.empty_like(a) for a in (x, state, taps, shift))
    work = 4 * x.size * len(taps)
    conv.causal_conv_backward.sized(work)(g, x, state, taps, dx, dstate, dtaps, dshift)
    if to_state is not None:  # the new state is the tail of the state followed by x
        kept = min(state.shape[1], x.shape[1])
        if kept:
            dx[:, x.shape[1] - kept :] += to_state[:, state.shape[1] - kept :]
        if kept < state.shape[1]:
            dstate[:, kept:] += to_state[:, : state.shape[1] - kept]
    return dx, dtaps.T.reshape(shape), dshift, dstate


def _causal_conv1d_reference(x, weight, bias=None, state=None, silu=False):
    batch, length, channels = x.shape
    weight = weight.reshape(channels, -1)
    size = weight.shape[1]
    past = np.zeros((batch, size - 1, channels)) if state is None else state
    padded = np.concatenate([past, x], axis=1)
    y = sum(padded[:, k : k + length] * weight[:, k] for k in range(size)) + (0 if bias is None else bias)
    return (y / (1 + np.exp(-y)) if silu else y), padded[:, length:]


def _causal_conv1d_samples(rng):
    def draw(batch, length, channels, size):
        return (rng.standard_normal((batch, length, channels)), rng.standard_normal((channels, size)),
                rng.standard_normal(channels), rng.standard_normal((batch, size - 1, channels)))

    yield draw(2, 5, 3, 4), {}
    yield draw(2, 2, 3, 4), {"silu": True}
    yield draw(1, 2, 130, 2), {"silu": True}
    yield draw(1, 1, 1, 1), {}
    yield (*draw(2, 4, 3, 3)[:2], None, None), {}


causal_conv1d = primitive("causal_conv1d", _causal_conv1d_forward, _causal_conv1d_vjp, outputs=2,
                          reference=_causal_conv1d_reference, samples=_causal_conv1d_samples)
