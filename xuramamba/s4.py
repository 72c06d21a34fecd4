"""S4 (arXiv 2111.00396): a diagonal plus rank-one state space for each feature, started from HiPPO-LegS.

Parameters have the names and shapes of the published kernel: A = -exp(A_real) - i A_imag, one of each
conjugate pair, minus P P*; dt = exp(inv_dt).  The published code replaces C by C~ = C (I - A**l) at its
first call and doubles l when a longer kernel is needed; here C stays itself, so any length is alike,
and :meth:`S4.load_published` undoes the replacement.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xuracore import ops
from xuracore.config import require
from xuracore.nn import Parameter
from xuracore.tensor import Tensor
from xuramamba import hippo
from xuramamba.linear_mixer import LinearMixer, LinearMixerConfig, log_uniform_steps

PUBLISHED_CLIP = 2.0  # of the imaginary part of B


class S4State(NamedTuple):
    """What one layer remembers of a sequence, whatever its length."""

    h: Tensor  # (B, d_model, N/2, 2) real and imaginary parts


@dataclass(frozen=True)
class S4Config(LinearMixerConfig):
    """Sizes and options of one layer; see :class:`~xuramamba.linear_mixer.LinearMixerConfig` for the rest."""

    init: str = "legs"
    discretization: str = "bilinear"

    def __post_init__(self):
        super().__post_init__()
        require(self.init == "legs", f"init={self.init!r}; S4 starts from 'legs', S4D has others")
        require(
            self.discretization == "bilinear",
            f"discretization={self.discretization!r}; S4 has 'bilinear', S4D also 'zoh'",
        )


class S4(LinearMixer):
    """``y, state = mixer(x, state=None, *, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    state, mask, cu_seqlens : as in :class:`~xuramamba.mamba1.Mamba1`.

    >>> mixer = S4(64, d_state=64, rng=np.random.default_rng(0))
    """

    State = S4State

    def __init__(self, d_model, *, rng=None, **fields):
        self.config = config = S4Config.from_dict({"d_model": d_model, **fields})
        rng = np.random.default_rng(0) if rng is None else rng
        poles, low_rank, enter = hippo.legs_normal_plus_low_rank(config.d_state, PUBLISHED_CLIP)

        def each(values):
            return np.tile(values, (d_model, 1)).astype(np.float32)

        def pairs(values):
            return np.stack([each(values.real), each(values.imag)], axis=-1)[None]

        shape = (config.channels, d_model, config.d_state // 2, 2)
        self.inv_dt = Parameter(log_uniform_steps(d_model, rng, config.dt_min, config.dt_max)[:, None])
        self.A_real, self.A_imag = Parameter(each(np.log(-poles.real))), Parameter(each(-poles.imag))
        self.B, self.P = Parameter(pairs(enter)), Parameter(pairs(low_rank))
        self.C = Parameter((rng.standard_normal(shape) * 0.5**0.5).astype(np.float32))
        self.D = Parameter(rng.standard_normal((config.channels, d_model)).astype(np.float32))
        self._build_output(rng)

    def system(self):
        return self.inv_dt[:, 0], -ops.exp(self.A_real), -self.A_imag, self.B[0], self.C, self.P[0]

    def _folded_readout(self, system, length):
        """C (I - A**length): a row vector walks as a state does, with P conjugated."""
        log_dt, a_real, a_imag, b, c, p = system
        conjugated = ops.stack(p[..., 0], -p[..., 1], axis=-1)
        silence = np.zeros((len(c), length, self.config.d_model), c.dtype)
        _, walked = ops.linear_state_scan(silence, log_dt, a_real, a_imag, b, c, conjugated, c)
        return c - walked

    def kernel(self, length):
        system = self.system()
        log_dt, a_real, a_imag, b, _, p = system
        folded = self._folded_readout(system, length)
        return ops.s4_kernel(log_dt, a_real, a_imag, b, folded, p, length=length)

    def load_published(self, parameters, l_kernel):
        """Take the published kernel's parameters, whose C is C~ for kernels of ``l_kernel`` tokens.

        parameters : a mapping of inv_dt, A_real, A_imag, B, C, P and, if it has them, D and the output layer.
        l_kernel : the module's buffer of that name; 0 if it was never called, when C is C itself.
        """
        self.load_state_dict({**self.state_dict(), **{key: np.asarray(x) for key, x in parameters.items()}})
        if l_kernel == 0:
            return
        log_dt, a_real, a_imag, _, c, p = (x.numpy().astype(np.float64) for x in self.system())
        for h in range(self.config.d_model):
            a, low = a_real[h] + 1j * a_imag[h], p[h, :, 0] + 1j * p[h, :, 1]
            a, low = np.concatenate([a, a.conj()]), np.concatenate([low, low.conj()])
            full, one = np.diag(a) - np.outer(low, low.conj()), np.eye(len(a))
            half = np.exp(log_dt[h]) / 2
            step = np.linalg.solve(one - half * full, one + half * full)
            rows = c[:, h, :, 0] + 1j * c[:, h, :, 1]
            rows = np.concatenate([rows, rows.conj()], axis=1)
            whole = np.linalg.solve((one - np.linalg.matrix_power(step, l_kernel)).T, rows.T).T
            whole = whole[:, : rows.shape[1] // 2]
            self.C.data[:, h] = np.stack([whole.real, whole.imag], axis=-1)
