"""Powers of poles, summed: the convolution kernel of a diagonal state space (S4D, arXiv 2206.11893).

::

    k[j, h, l] = 2 Re sum_n weight[j, h, n] pole[h, n]**l        l = 0 … L - 1

Backward both sums go by Horner's rule from the last l, without any power::

    g_weight = 2 sum_l g_l conj(pole)**l          g_pole = conj(weight) 2 sum_l l g_l conj(pole)**(l - 1)

Float64, so that thousands of products keep their digits.  weight ``(J, H, 2, N)``, real parts first;
pole ``(H, 2, N)``; k ``(J, H, L)``.  A task is one feature h.
"""

import numpy as np

from xuracore.jit import REDUCE, kernel


def _complex(x):
    return x[..., 0, :] + 1j * x[..., 1, :]


def vandermonde_forward_numpy(weight, pole, k):
    """NumPy twin of :func:`vandermonde_forward`."""
    term, pole = _complex(weight), _complex(pole)
    for step in range(k.shape[2]):
        k[:, :, step] = 2 * term.real.sum(-1)
        term = term * pole


def vandermonde_backward_numpy(weight, pole, gk, gweight, gpole):
    """NumPy twin of :func:`vandermonde_backward`."""
    back = _complex(pole).conj()
    value, slope = np.zeros((2, *gweight.shape[:2], gweight.shape[3]), complex)
    for step in reversed(range(gk.shape[2])):
        slope = slope * back + value
        value = value * back + gk[:, :, step, None]
    gweight[:, :, 0], gweight[:, :, 1] = 2 * value.real, 2 * value.imag
    total = 2 * (_complex(weight).conj() * slope).sum(0)
    gpole[:, 0], gpole[:, 1] = total.real, total.imag


@kernel(twin=vandermonde_forward_numpy, fastmath=REDUCE)
def vandermonde_forward(start, stop, weight, pole, k):
    """Writes k.  ``H`` tasks."""
    channels, _, length = k.shape
    size = pole.shape[2]
    re, im = np.empty(size, k.dtype), np.empty(size, k.dtype)
    for h in range(start, stop):
        z_re, z_im = pole[h, 0], pole[h, 1]
        for j in range(channels):
            for n in range(size):
                re[n], im[n] = weight[j, h, 0, n], weight[j, h, 1, n]
            for step in range(length):
                total = k.dtype.type(0)
                for n in range(size):
                    total += re[n]
                    real = re[n] * z_re[n] - im[n] * z_im[n]
                    im[n] = re[n] * z_im[n] + im[n] * z_re[n]
                    re[n] = real
                k[j, h, step] = k.dtype.type(2) * total


@kernel(twin=vandermonde_backward_numpy, fastmath=REDUCE)
def vandermonde_backward(start, stop, weight, pole, gk, gweight, gpole):
    """Gradients of :func:`vandermonde_forward`.  ``H`` tasks."""
    channels, _, length = gk.shape
    size = pole.shape[2]
    zero, two = gk.dtype.type(0), gk.dtype.type(2)
    value, slope = np.empty((2, size), gk.dtype), np.empty((2, size), gk.dtype)
    for h in range(start, stop):
        z_re, z_im = pole[h, 0], pole[h, 1]
        for n in range(size):
            gpole[h, 0, n], gpole[h, 1, n] = zero, zero
        for j in range(channels):
            for n in range(size):
                value[0, n], value[1, n], slope[0, n], slope[1, n] = zero, zero, zero, zero
            for back in range(length):
                g = gk[j, h, length - 1 - back]
                for n in range(size):
                    real, imag = value[0, n], value[1, n]
                    s_re, s_im = slope[0, n], slope[1, n]
                    slope[0, n] = s_re * z_re[n] + s_im * z_im[n] + real
                    slope[1, n] = s_im * z_re[n] - s_re * z_im[n] + imag
                    value[0, n] = real * z_re[n] + imag * z_im[n] + g
                    value[1, n] = imag * z_re[n] - real * z_im[n]
            w_re, w_im = weight[j, h, 0], weight[j, h, 1]
            for n in range(size):
                gweight[j, h, 0, n], gweight[j, h, 1, n] = two * value[0, n], two * value[1, n]
                gpole[h, 0, n] += two * (w_re[n] * slope[0, n] + w_im[n] * slope[1, n])
                gpole[h, 1, n] += two * (w_re[n] * slope[1, n] - w_im[n] * slope[0, n])
