"""Linear state spaces with constant coefficients (S4, S4D) as ops: their kernels, the long convolution, their scan.

One feature h has N complex modes, each standing for a conjugate pair, and the parameters that all
ops here share: log_dt (H,); A_real, A_imag (H, N); B (H, N, 2), P (H, N, 2) and C (K, H, N, 2) with
real and imaginary parts on the last axis, for K output channels.  In the modes' basis
A = diag(A) - P P*, and P = None is the diagonal system.  Everything is computed in float64.

For a complex p the gradient is dL/dRe p + i dL/dIm p, so a holomorphic f has g_x = g_f conj(f'(x)).
"""

import numpy as np

from xuracore.autograd import is_grad_enabled
from xuracore.errors import ConfigError, ShapeError
from xuracore.kernels import linear_state, vandermonde
from xuracore.ops.registry import primitive

SERIES_BELOW = 0.02  # below it the closed forms of phi1 and its slope lose digits, and few terms have them all
RULES = ("zoh", "bilinear")
BLOCK = 64  # steps between stored states


def _complex(x):
    x = np.asarray(x, np.float64)
    return x[..., 0] + 1j * x[..., 1]


def _pairs(z, like):
    return np.stack([z.real, z.imag], axis=-1).astype(like.dtype)


def _planes(z):
    """Complex (…, N) to (…, 2, N), as kernels take it."""
    return np.ascontiguousarray(np.stack([z.real, z.imag], axis=-2))


def _joined(x):
    return x[..., 0, :] + 1j * x[..., 1, :]


def phi1(z):
    """(phi1, phi1') of a complex array, phi1(z) = (e**z - 1) / z."""
    small = np.abs(z) < SERIES_BELOW
    safe = np.where(small, 1, z)
    value = np.expm1(safe) / safe
    slope = (np.exp(safe) * (safe - 1) + 1) / safe**2
    terms = [1 / 2, 1 / 3, 1 / 8, 1 / 30, 1 / 144, 1 / 840, 1 / 5760]  # 1 / (k! (k + 2))
    near_slope = sum(c * z**k for k, c in enumerate(terms))
    near = 1 + z / 2 + z**2 / 6 + z**3 / 24 + z**4 / 120 + z**5 / 720 + z**6 / 5040
    return np.where(small, near, value), np.where(small, near_slope, slope)


class _System:
    """The parameters in float64, and one step of them: keep, enter, and for low rank q and r."""

    def __init__(self, op, log_dt, a_real, a_imag, b, c, p, rule):
        if rule not in RULES or p is not None and rule != "bilinear":
            raise ConfigError(f"{op}: discretization={rule!r}; expected 'bilinear', or without P also 'zoh'")
        if np.ndim(a_real) != 2 or np.ndim(c) != 4:
            raise ShapeError(f"{op}: A_real {np.shape(a_real)}, C {np.shape(c)}; expected (H, N), (K, H, N, 2)")
        features, size = a_real.shape
        expected = {
            "log_dt": (features,), "A_imag": (features, size), "B": (features, size, 2),
            "C": (c.shape[0], features, size, 2), "P": (features, size, 2),
        }  # fmt: skip
        for (name, shape), x in zip(expected.items(), (log_dt, a_imag, b, c, p)):
            if x is not None and np.shape(x) != shape:
                raise ShapeError(f"{op}: {name} has shape {np.shape(x)}; expected {shape}")
        self.given = log_dt, a_real, a_imag, b, c, p
        self.rule, self.size = rule, size
        self.dt = np.exp(np.asarray(log_dt, np.float64))[:, None]
        self.A = np.asarray(a_real, np.float64) + 1j * np.asarray(a_imag, np.float64)
        self.B = np.ones(self.A.shape, complex) if b is None else _complex(b)
        self.C, self.P = _complex(c), np.zeros_like(self.A) if p is None else _complex(p)
        z = self.dt * self.A
        if rule == "zoh":
            self.keep, (self.gain, self.slope) = np.exp(z), phi1(z)
            self.keep_slope = self.keep
        else:
            inverse = 1 / (1 - z / 2)
            self.keep, self.gain = (1 + z / 2) * inverse, inverse
            self.keep_slope = inverse**2
            self.slope = self.keep_slope / 2
        self.enter = self.dt * self.gain * self.B
        self.q = self.dt / 2 * self.gain * self.P
        self.r = 1 / (1 + 2 * (self.P.conj() * self.q).real.sum(axis=1))

    def gradients(self, to_keep, to_enter, to_c, to_p=0, to_q=0, to_r=0):
        """Gradients of the given parameters from those of keep, enter, C, p, q, r."""
        dt, a = self.dt, self.A
        to_span = -np.reshape(to_r, (-1, 1)) * self.r[:, None] ** 2
        to_p = to_p + 2 * to_span * self.q
        to_q = to_q + 2 * to_span * self.P
        to_gain = dt * (to_enter * self.B.conj() + to_q * self.P.conj() / 2)
        to_z = to_keep * self.keep_slope.conj() + to_gain * self.slope.conj()
        to_dt = to_z * a.conj() + to_enter * (self.gain * self.B).conj() + to_q * (self.gain * self.P / 2).conj()
        to_p = to_p + to_q * (dt / 2 * self.gain).conj()
        return self.finish(to_dt, dt * to_z, to_enter * (dt * self.gain).conj(), to_c, to_p)

    def finish(self, to_dt, to_a, to_b, to_c, to_p):
        """The same from those of dt (not yet summed over modes), A, B, C and P."""
        log_dt, a_real, a_imag, b, c, p = self.given
        return (
            (to_dt.real.sum(axis=1) * self.dt[:, 0]).astype(log_dt.dtype), to_a.real.astype(a_real.dtype),
            to_a.imag.astype(a_imag.dtype), None if b is None else _pairs(to_b, b), _pairs(to_c, c),
            None if p is None else _pairs(to_p, p),
        )  # fmt: skip


# ---------------------------------------------------------------------- the kernel of S4D
def _s4d_kernel_forward(log_dt, A_real, A_imag, B, C, *, length, discretization="zoh"):
    """The convolution kernel of a diagonal state space (S4D, arXiv 2206.11893): (K, H, length).

    k[l] = 2 Re sum_n C_n B_n A_n**l with A, B made discrete by 'zoh' or 'bilinear'.  B may be None: ones.
    Shapes as at the head of this module.  Raises ShapeError, ConfigError.
    """
    system = _System("s4d_kernel", log_dt, A_real, A_imag, B, C, None, discretization)
    weight, pole = _planes(system.C * system.enter), _planes(system.keep)
    k = np.empty((*C.shape[:2], length))
    work = 8 * k.size * system.size
    vandermonde.vandermonde_forward.split(k.shape[1], work)(weight, pole, k)
    return k.astype(C.dtype), (system, weight, pole)


def _s4d_kernel_vjp(grad, saved, needs):
    system, weight, pole = saved
    to_weight, to_pole = np.empty_like(weight), np.empty_like(pole)
    grad = np.ascontiguousarray(grad, np.float64)
    call = vandermonde.vandermonde_backward.split(grad.shape[1], 16 * grad.size * system.size)
    call(weight, pole, grad, to_weight, to_pole)
    to_weight = _joined(to_weight)
    to_enter = (to_weight * system.C.conj()).sum(axis=0)
    return system.gradients(_joined(to_pole), to_enter, to_weight * system.enter.conj())[:5]


def _s4d_kernel_reference(log_dt, A_real, A_imag, B, C, *, length, discretization="zoh"):
    a, dt = A_real + 1j * A_imag, np.exp(log_dt)[:, None]
    b = 1 if B is None else _complex(B)
    if discretization == "zoh":
        pole, enter = np.exp(dt * a), np.expm1(dt * a) / a * b
    else:
        pole, enter = (1 + dt * a / 2) / (1 - dt * a / 2), dt * b / (1 - dt * a / 2)
    powers = pole[:, :, None] ** np.arange(length)
    return 2 * np.einsum("khn,hnl->khl", _complex(C) * enter, powers).real


def _draw_system(rng, features, size, channels, low_rank):
    normal = rng.standard_normal
    system = [
        rng.uniform(-2, -0.5, features), -rng.uniform(0.3, 1, (features, size)),
        3 * normal((features, size)), normal((features, size, 2)), normal((channels, features, size, 2)),
    ]  # fmt: skip
    return system + [normal((features, size, 2))] * low_rank


def _s4d_kernel_samples(rng):
    yield tuple(_draw_system(rng, 2, 3, 1, False)), {"length": 7}
    yield tuple(_draw_system(rng, 2, 3, 2, False)), {"length": 6, "discretization": "bilinear"}
    log_dt, *rest = _draw_system(rng, 1, 1, 1, False)
    yield (log_dt - 8, *rest), {"length": 1}
    log_dt, a_real, a_imag, _, c = _draw_system(rng, 3, 2, 1, False)
    yield (log_dt, a_real, a_imag, None, c), {"length": 5}


s4d_kernel = primitive("s4d_kernel", _s4d_kernel_forward, _s4d_kernel_vjp,
                       reference=_s4d_kernel_reference, samples=_s4d_kernel_samples)


# ---------------------------------------------------------------------- the kernel of S4
class _Nodes:
    """Where the generating function is evaluated, and one feature's Cauchy matrix there.

    With w = exp(-2 pi i m / L), s = 1 + w and e = 2 (1 - w), the matrix is 1 / (e - s dt A): finite at
    w = -1 too, where the usual 1 / (2 (1 - w) / (1 + w) - dt A) has its pole.
    """

    def __init__(self, length):
        w = np.exp(-2j * np.pi / length * np.arange(length // 2 + 1))
        self.s, self.e = 1 + w[:, None], 2 * (1 - w[:, None])
        self.weight = np.where((np.arange(len(w)) == 0) | (2 * np.arange(len(w)) == length), 1, 2) / length

    def cauchy(self, z):
        return 1 / (self.e - self.s * z)


def _closed(z):
    """Modes followed by their conjugates."""
    return np.concatenate([z, z.conj()], axis=-1)


def _folded(g, size):
    return g[..., :size] + g[..., size:].conj()


def _cauchy_sums(system, nodes, h):
    """(R, V, sums): sums = dt R V, columns (B, C_k) for each k, (B, P*), (P, C_k), (P, P*)."""
    a, b, c, p = (_closed(x) for x in (system.A[h], system.B[h], system.C[:, h], system.P[h]))
    matrix = nodes.cauchy(system.dt[h] * a)
    columns = np.concatenate([b * c, (b * p.conj())[None], p * c, (p * p.conj())[None]]).T
    return matrix, columns, system.dt[h] * (matrix @ columns)


def _s4_kernel_forward(log_dt, A_real, A_imag, B, C, P, *, length):
    """The convolution kernel of S4 (diagonal plus rank one, bilinear; arXiv 2111.00396): (K, H, length).

    C is the C~ = C (I - A**length) of the truncated generating function, as the published parameters
    hold it; then k[l] = C A**l B for l < length, by Cauchy sums at the roots of unity and one FFT.
    Shapes as at the head of this module.  Raises ShapeError.
    """
    system = _System("s4_kernel", log_dt, A_real, A_imag, B, C, P, "bilinear")
    channels, nodes = len(C), _Nodes(length)
    spectrum = np.empty((channels, len(system.A), len(nodes.s)), complex)
    for h in range(len(system.A)):
        sums = _cauchy_sums(system, nodes, h)[2]
        bc, bp, pc, pp = np.split(sums, (channels, channels + 1, 2 * channels + 1), axis=1)
        spectrum[:, h] = 2 * (bc - nodes.s * bp * pc / (1 + nodes.s * pp)).T
    return np.fft.irfft(spectrum, length, axis=-1).astype(C.dtype), (system, nodes)


def _s4_kernel_vjp(grad, saved, needs):
    system, nodes = saved
    channels, size = len(system.C), system.size
    to_spectrum = nodes.weight * np.fft.rfft(np.asarray(grad, np.float64), axis=-1)
    to_dt, to_a, to_b, to_p = (np.zeros(system.A.shape, complex) for _ in range(4))
    to_c = np.empty(system.C.shape, complex)
    cuts = channels, channels + 1, 2 * channels + 1
    for h in range(len(system.A)):
        matrix, columns, sums = _cauchy_sums(system, nodes, h)
        _, bp, pc, pp = np.split(sums, cuts, axis=1)
        g, over = to_spectrum[:, h].T, nodes.s / (1 + nodes.s * pp)
        to_bp = -2 * (g * (over * pc).conj()).sum(axis=1, keepdims=True)
        to_pp = 2 * (g * (over**2 * bp * pc).conj()).sum(axis=1, keepdims=True)
        to_sums = np.concatenate([2 * g, to_bp, -2 * g * (over * bp).conj(), to_pp], axis=1)
        dt, (b, c, p) = system.dt[h], (_closed(x) for x in (system.B[h], system.C[:, h], system.P[h]))
        to_columns = dt * (matrix.conj().T @ to_sums)
        to_z = dt * (columns.conj() * ((nodes.s * matrix**2).conj().T @ to_sums)).sum(axis=1)
        by = to_columns.T
        by_bc, by_bp, by_pc, by_pp = np.split(by, cuts)
        to_b[h] = _folded((by_bc * c.conj()).sum(axis=0) + by_bp[0] * p, size)
        to_c[:, h] = _folded(by_bc * b.conj() + by_pc * p.conj(), size)
        conjugated = by_bp[0] * b.conj() + by_pp[0] * p.conj()
        to_p[h] = _folded((by_pc * c.conj()).sum(axis=0) + by_pp[0] * p + conjugated.conj(), size)
        to_a[h] = _folded(dt * to_z, size)
        along = _folded(to_z, size) * system.A[h].conj()
        to_dt[h] = along
        to_dt[h, 0] += (to_sums * (sums / dt).conj()).real.sum()
    return system.finish(to_dt, to_a, to_b, to_c, to_p)


def _dense_step(log_dt, a, b, p):
    """(A, B) of one bilinear step of one feature, over modes and their conjugates."""
    a, b, p, dt = _closed(a), _closed(b), _closed(p), np.exp(log_dt)
    full = np.diag(a) - np.outer(p, p.conj())
    one = np.eye(len(a))
    inverse = np.linalg.inv(one - dt / 2 * full)
    return inverse @ (one + dt / 2 * full), inverse @ (dt * b)


def _s4_kernel_reference(log_dt, A_real, A_imag, B, C, P, *, length):
    k = np.empty((len(C), len(log_dt), length))
    for h in range(len(log_dt)):
        step, enter = _dense_step(log_dt[h], A_real[h] + 1j * A_imag[h], _complex(B[h]), _complex(P[h]))
        c = _closed(_complex(C[:, h])) @ np.linalg.inv(np.eye(len(step)) - np.linalg.matrix_power(step, length))
        for i in range(length):
            k[:, h, i] = (c @ np.linalg.matrix_power(step, i) @ enter).real
    return k


def _s4_kernel_samples(rng):
    yield tuple(_draw_system(rng, 2, 2, 2, True)), {"length": 6}
    yield tuple(_draw_system(rng, 1, 3, 1, True)), {"length": 7}
    yield tuple(_draw_system(rng, 1, 1, 1, True)), {"length": 1}


s4_kernel = primitive("s4_kernel", _s4_kernel_forward, _s4_kernel_vjp,
                      reference=_s4_kernel_reference, samples=_s4_kernel_samples)


# ---------------------------------------------------------------------- the long convolution
def fast_length(n):
    """The least 2**i 3**j 5**k that is not below ``n``: lengths that an FFT likes."""
    best, three = 1 << max(0, n - 1).bit_length(), 1
    while three < best:
        five = three
        while five < best:
            rest = five << max(0, -(-n // five) - 1).bit_length()
            best = min(best, rest) if rest >= n else best
            five *= 5
        three *= 3
    return best


def _spectra(x, n):
    """rfft of (…, L) zero padded to n, in float64."""
    return np.fft.rfft(np.asarray(x, np.float64), n, axis=-1)


def _fft_conv_forward(u, k):
    """Causal convolution of u (B, L, H) with long kernels k (K, H, M), by FFT: (B, L, K, H).

    y[b, t, j, h] = sum_s k[j, h, s] u[b, t - s, h].  In float64 inside.  Raises ShapeError.
    """
    if np.ndim(u) != 3 or np.ndim(k) != 3 or k.shape[1] != u.shape[2]:
        raise ShapeError(f"fft_conv: u {np.shape(u)}, k {np.shape(k)}; expected (B, L, H) and (K, H, M)")
    length, size = u.shape[1], min(k.shape[2], u.shape[1])
    n = fast_length(length + size - 1)
    of_u, of_k = _spectra(u.transpose(0, 2, 1), n), _spectra(k[:, :, :size], n)
    y = np.fft.irfft(of_u[:, None] * of_k, n, axis=-1)[..., :length]
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2), dtype=u.dtype), (u, k, n, size)


def _fft_conv_vjp(grad, saved, needs):
    u, k, n, size = saved
    length, to_u, to_k = u.shape[1], None, None
    of_y = _spectra(grad.transpose(0, 2, 3, 1), n)
    if needs[0]:
        of_k = _spectra(k[:, :, :size], n)
        to_u = np.fft.irfft((of_k.conj() * of_y).sum(axis=1), n, axis=-1)[..., :length]
        to_u = np.ascontiguousarray(to_u.transpose(0, 2, 1), dtype=u.dtype)
    if needs[1]:
        of_u = _spectra(u.transpose(0, 2, 1), n)
        to_k = np.zeros(k.shape, k.dtype)
        to_k[:, :, :size] = np.fft.irfft((of_u.conj()[:, None] * of_y).sum(axis=0), n, axis=-1)[..., :size]
    return to_u, to_k


def _fft_conv_reference(u, k):
    y = np.zeros((*u.shape[:2], *k.shape[:2]))
    for t in range(u.shape[1]):
        for s in range(min(t + 1, k.shape[2])):
            y[:, t] += k[:, :, s] * u[:, t - s, None]
    return y


def _fft_conv_samples(rng):
    for batch, length, channels, features, taps in ((2, 6, 1, 3, 6), (1, 5, 2, 2, 3), (2, 3, 1, 2, 8), (1, 1, 1, 1, 1)):
        yield (rng.standard_normal((batch, length, features)), rng.standard_normal((channels, features, taps))), {}


fft_conv = primitive("fft_conv", _fft_conv_forward, _fft_conv_vjp,
                     reference=_fft_conv_reference, samples=_fft_conv_samples)


# ---------------------------------------------------------------------- step by step
def _linear_state_scan_forward(u, log_dt, A_real, A_imag, B, C, P=None, state=None, *, discretization="bilinear"):
    """S4 and S4D token by token, O(N) a step: (y (B, L, K, H), last state (B, H, N, 2)).

    y = 2 Re sum C x, without a skip.  u (B, L, H); state (B, H, N, 2), None for zeros; P None is the
    diagonal system, which may also take discretization='zoh'.  Other shapes as at the head of this
    module.  C here is C itself, not the C~ of :func:`s4_kernel`.  Raises ShapeError, ConfigError.
    """
    system = _System("linear_state_scan", log_dt, A_real, A_imag, B, C, P, discretization)
    features, size = A_real.shape
    batch, length = u.shape[:2]
    if u.ndim != 3 or u.shape[2] != features:
        raise ShapeError(f"linear_state_scan: u has shape {u.shape}; expected (B, L, {features})")
    if state is not None and state.shape != (batch, features, size, 2):
        raise ShapeError(f"state has shape {state.shape}; expected {(batch, features, size, 2)}")
    start = np.zeros((batch, features, 2, size)) if state is None else _planes(_complex(state))
    given = [
        np.ascontiguousarray(u, np.float64), *map(_planes, (system.keep, system.enter, system.P, system.q)),
        system.r, _planes(system.C),
    ]  # fmt: skip
    block = min(length, BLOCK) if is_grad_enabled() else length
    block, low_rank = max(1, block), P is not None
    y, last = np.empty((batch, length, len(C), features)), np.empty_like(start)
    stored = np.empty((batch, -(-length // block), features, 2, size))
    tasks, work = batch * features, 30 * batch * length * features * size
    linear_state.linear_state_forward.split(tasks, work)(*given, start, low_rank, block, y, last, stored)
    last = np.ascontiguousarray(last.swapaxes(2, 3))
    outputs = y.astype(u.dtype, copy=False), last.astype(u.dtype, copy=False)
    return outputs, (system, given, low_rank, block, stored, tasks, work, u.dtype)


def _linear_state_scan_vjp(grad, saved, needs):
    system, given, low_rank, block, stored, tasks, work, dtype = saved
    u, keep, c = given[0], given[1], given[6]
    batch, length, features = u.shape
    size = keep.shape[2]
    shapes = (batch, length, len(c), features), (batch, features, size, 2)
    to_y, to_last = (np.zeros(form) if g is None else np.asarray(g, np.float64) for g, form in zip(grad, shapes))
    each = (batch, features, 2, size)
    out = [np.empty(form) for form in (u.shape, each, each, each, each, (batch, features), (batch, *c.shape), each)]
    call = linear_state.linear_state_backward.split(tasks, 4 * work)
    to_last = np.ascontiguousarray(to_last.swapaxes(2, 3))
    call(*given, low_rank, block, stored, np.ascontiguousarray(to_y), to_last, *out)
    keep, enter, p, q, c = (_joined(out[i].sum(axis=0)) for i in (1, 2, 3, 4, 6))
    parameters = system.gradients(keep, enter, c, p, q, out[5].sum(axis=0))
    to_start = np.ascontiguousarray(out[7].swapaxes(2, 3)).astype(dtype, copy=False)
    return (out[0].astype(dtype, copy=False), *parameters, to_start)[: len(needs)]


def _linear_state_scan_reference(u, log_dt, A_real, A_imag, B, C, P=None, state=None, *, discretization="bilinear"):
    batch, length, features = u.shape
    y = np.zeros((batch, length, len(C), features))
    last = np.zeros((batch, *A_real.shape, 2))
    for h in range(features):
        a, b = A_real[h] + 1j * A_imag[h], _complex(B[h])
        if discretization == "zoh":
            z = _closed(a) * np.exp(log_dt[h])
            step, enter = np.diag(np.exp(z)), np.expm1(z) / _closed(a) * _closed(b)
        else:
            step, enter = _dense_step(log_dt[h], a, b, np.zeros_like(a) if P is None else _complex(P[h]))
        for s in range(batch):
            x = np.zeros(len(step), complex) if state is None else _closed(_complex(state[s, h]))
            for t in range(length):
                x = step @ x + enter * u[s, t, h]
                y[s, t, :, h] = (_closed(_complex(C[:, h])) @ x).real
            last[s, h] = np.stack([x.real, x.imag], axis=-1)[: len(a)]
    return y, last


def _linear_state_scan_samples(rng):
    for batch, length, features, size, channels, low_rank, state, rule in (
        (2, 4, 2, 2, 1, True, True, "bilinear"), (1, 3, 1, 3, 2, True, False, "bilinear"),
        (2, 3, 2, 2, 1, False, True, "zoh"), (1, 1, 1, 1, 1, False, True, "bilinear"),
    ):  # fmt: skip
        system = _draw_system(rng, features, size, channels, low_rank) + [None] * (not low_rank)
        start = [rng.standard_normal((batch, features, size, 2))] * state
        yield (rng.standard_normal((batch, length, features)), *system, *start), {"discretization": rule}


linear_state_scan = primitive(
    "linear_state_scan", _linear_state_scan_forward, _linear_state_scan_vjp, outputs=2, tolerance=1e-4,
    reference=_linear_state_scan_reference, samples=_linear_state_scan_samples,
)  # fmt: skip
