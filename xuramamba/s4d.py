"""S4D (arXiv 2206.11893): a diagonal state space for each feature, with constant coefficients.

Parameters have the names of the published minimal module: A = -exp(log_A_real) + i A_imag, one of each
conjugate pair, B folded into C, one step size a feature.
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


class S4DState(NamedTuple):
    """What one layer remembers of a sequence, whatever its length."""

    h: Tensor  # (B, d_model, N/2, 2) real and imaginary parts


@dataclass(frozen=True)
class S4DConfig(LinearMixerConfig):
    """Sizes and options of one layer; see :class:`~xuramamba.linear_mixer.LinearMixerConfig` for the rest.

    init : 'lin', 'inv', 'legs' or 'real'.   discretization : 'zoh' or 'bilinear'.
    """

    init: str = "lin"
    discretization: str = "zoh"

    def __post_init__(self):
        super().__post_init__()
        hippo.diagonal(self.init, 2)  # refuses an unknown name
        require(
            self.discretization in ("zoh", "bilinear"),
            f"discretization={self.discretization!r}; expected 'zoh' or 'bilinear'",
        )


class S4D(LinearMixer):
    """``y, state = mixer(x, state=None, *, mask=None, cu_seqlens=None)``, x and y (B, L, d_model).

    state, mask, cu_seqlens : as in :class:`~xuramamba.mamba1.Mamba1`.

    >>> mixer = S4D(64, d_state=64, init="legs", discretization="bilinear", rng=np.random.default_rng(0))
    """

    State = S4DState

    def __init__(self, d_model, *, rng=None, **fields):
        self.config = config = S4DConfig.from_dict({"d_model": d_model, **fields})
        rng = np.random.default_rng(0) if rng is None else rng
        half = config.d_state // 2
        poles = np.tile(hippo.diagonal(config.init, config.d_state), (d_model, 1))
        shape = (d_model, half, 2) if config.channels == 1 else (config.channels, d_model, half, 2)
        skip = d_model if config.channels == 1 else (config.channels, d_model)
        self.log_dt = Parameter(log_uniform_steps(d_model, rng, config.dt_min, config.dt_max))
        self.log_A_real = Parameter(np.log(-poles.real).astype(np.float32))
        self.A_imag = Parameter(poles.imag.astype(np.float32))
        self.C = Parameter((rng.standard_normal(shape) * 0.5**0.5).astype(np.float32))
        self.D = Parameter(rng.standard_normal(skip).astype(np.float32))
        self._build_output(rng)

    def system(self):
        c = self.config
        readout = self.C.reshape(c.channels, c.d_model, c.d_state // 2, 2)
        return self.log_dt, -ops.exp(self.log_A_real), self.A_imag, None, readout, None

    def kernel(self, length):
        return ops.s4d_kernel(*self.system()[:5], length=length, discretization=self.discretization)
