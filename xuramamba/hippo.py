"""Starts of linear state spaces: HiPPO-LegS in its normal-plus-low-rank form, and the diagonal starts of S4D.

HiPPO (arXiv 2008.07669) chooses A and B so that the state holds the coefficients of the past in
Legendre polynomials; S4 (arXiv 2111.00396, appendix C) brings it to the form diag(A) - P P*.
Everything is computed in float64, and of each conjugate pair one mode is returned.
"""

import math

import numpy as np

from xuracore.errors import ConfigError

DIAGONAL = ("lin", "inv", "legs", "real")


def legs(size):
    """(A (N, N), B (N,), P (N,)) of HiPPO-LegS; A + P P^T is -1/2 plus a skew-symmetric matrix."""
    n = np.arange(size, dtype=np.float64)
    root = np.sqrt(2 * n + 1)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1), root, np.sqrt(n + 0.5)


def legs_normal_plus_low_rank(size, clip=None):
    """(A, P, B), each (N/2,) complex: HiPPO-LegS in the basis where A + P P^T is diagonal.

    The modes with negative imaginary part, from the fastest to the slowest.
    clip : bound of the imaginary part of B, 2 in the published code.
    Raises ConfigError for an odd or non-positive size.
    """
    _even(size)
    a, b, p = legs(size)
    skew = a + np.outer(p, p) + 0.5 * np.eye(size)
    frequency, basis = np.linalg.eigh(-1j * skew)
    half = size // 2
    basis = basis[:, :half]
    b, p = basis.conj().T @ b, basis.conj().T @ p
    if clip is not None:
        b = b.real + 1j * b.imag.clip(-clip, clip)
    return -0.5 + 1j * frequency[:half], p, b


def diagonal(init, size):
    """(N/2,) complex poles of S4D (arXiv 2206.11893): 'lin', 'inv', 'legs' or 'real'.

    Imaginary parts are not negative.  Names may carry the paper's prefix, as in 'S4D-Lin'.
    Raises ConfigError.
    """
    _even(size)
    name = str(init).lower().removeprefix("s4d-").removeprefix("diag-").removeprefix("s4d")
    n = np.arange(size // 2, dtype=np.float64)
    if name == "lin":
        return -0.5 + 1j * math.pi * n
    if name == "inv":
        return -0.5 + 1j * size / math.pi * (size / (2 * n + 1) - 1)
    if name == "legs":
        return legs_normal_plus_low_rank(size)[0].conj()
    if name == "real":
        return -(n + 1) + 0j
    raise ConfigError(f"init={init!r}; expected one of {', '.join(DIAGONAL)}")


def _even(size):
    if size < 2 or size % 2:
        raise ConfigError(f"the state has size {size}; expected an even number: modes come in conjugate pairs")
