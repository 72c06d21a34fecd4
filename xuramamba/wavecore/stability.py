"""Stability: the largest Lyapunov exponents by QR, and a monitor of a running model.

Benettin's method: k tangent vectors are carried along a trajectory with the step's Jacobian-vector products, made
orthonormal by QR every few steps, and λ_i = Σ log R_ii / T (per step).  Products are central differences in
float64, so a step function is all it needs.
"""

import math
import time
from collections import deque
from typing import NamedTuple

import numpy as np

from xuracore.config import require
from xuracore.errors import ConfigError
from xuramamba.wavecore.model import CoreState
from xuramamba.wavecore.parameters import arrays


class Exponents(NamedTuple):
    """Lyapunov exponents per step: of the mean trajectory, and of each one with a bootstrap interval for λ₁."""

    values: np.ndarray  # (k), largest first
    trajectories: np.ndarray  # (n), λ₁ of each
    low: float  # 95 % interval of the mean λ₁
    high: float

    @property
    def largest(self):
        """λ₁."""
        return float(self.values[0])


def lyapunov(step, start, steps, *, count=4, every=1, skip=0, difference=1e-5, rng):
    """Exponents (count) of one trajectory, per step, largest first.

    step(points (m, n), t) -> (m, n) : the map, row by row, float64; row 0 is the trajectory itself.
    start (n); every : steps between QR; skip : steps before measuring.
    """
    start = np.asarray(start, np.float64)
    count = min(count, start.size)
    require(steps > skip and every > 0 and count > 0, f"steps={steps}, skip={skip}, every={every}, count={count}")
    tangents = np.linalg.qr(rng.standard_normal((start.size, count)))[0]
    point, sums = start, np.zeros(count)
    for t in range(steps):
        around = np.concatenate([point[None], point + difference * tangents.T, point - difference * tangents.T])
        moved = step(around, t)
        point = moved[0]
        tangents = ((moved[1 : count + 1] - moved[count + 1 :]) / (2 * difference)).T
        if (t + 1) % every == 0 or t + 1 in (skip, steps):
            tangents, r = np.linalg.qr(tangents)
            if t >= skip:
                sums += np.log(np.maximum(np.abs(np.diag(r)), 1e-300))
    return np.sort(sums / (steps - skip))[::-1]


def model_exponents(model, variables, obs, actions, rewards, *, count=4, skip=10, resamples=1000, seed=0):
    """Exponents of the recurrent state (s, w, p) of a model along recorded inputs, each row a trajectory.

    obs (n, T, obs_dim), actions (n, T, action_dim), rewards (n, T, 1).  The memory is that of the
    trajectory: neighbours read it, and their writes are not followed.
    """
    params, rng = arrays(variables["params"], np.float64), np.random.default_rng(seed)
    sizes = np.cumsum([model.config.d_s, model.config.d_w])
    dims = model.config.d_s + model.config.d_w + model.config.d_p
    found = []
    for row in range(len(obs)):
        held = [model.initial_state(1, np.float64)]

        def step(points, t, row=row, held=held):
            n, state = len(points), held[0]
            inputs = (np.broadcast_to(np.asarray(x[row, t], np.float64), (n, x.shape[-1]))
                      for x in (obs, actions, rewards))
            shared = [[np.broadcast_to(x, (n, *x.shape[1:])) for x in part] for part in state[3:]]
            _, after, _ = model.step(params, *inputs, CoreState(*np.split(points, sizes, axis=1), *shared))
            held[0] = CoreState(*(x[:1] for x in after[:3]), *([x[:1] for x in part] for part in after[3:]))
            return np.concatenate(after[:3], axis=1)

        found.append(lyapunov(step, np.zeros(dims), obs.shape[1], count=count, skip=skip, rng=rng))
    found = np.array(found)
    return Exponents(found.mean(axis=0), found[:, 0], *bootstrap_interval(found[:, 0], resamples, rng))


def bootstrap_interval(values, resamples, rng, share=0.95):
    """The interval of the mean of ``values`` by resampling."""
    means = rng.choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


class StabilityMonitor:
    """Watches a model while it runs or learns, over the last ``window`` steps.

    lyapunov_* here is the energy V = Σ‖state‖² of the published system, and dissipation its change; the exponents
    proper are :func:`model_exponents`.
    """

    def __init__(self, window=100, *, lyapunov_threshold=1e7, dissipation_floor=-50.0, spike=10.0):
        if not isinstance(window, int) or window < 1:
            raise ConfigError(f"window={window!r}; expected a whole number of steps (a threshold goes by its name)")
        self.lyapunov_threshold, self.dissipation_floor, self.spike = lyapunov_threshold, dissipation_floor, spike
        self._energies, self._gradients = deque(maxlen=window), deque(maxlen=window)
        self.reset()

    def reset(self):
        """Forget what was seen."""
        self._energies.clear()
        self._gradients.clear()
        self.steps, self._state, self._bad = 0, None, (False, False)

    def update(self, state, gradient_norm=None):
        """Take in a CoreState (or None where only a gradient is known), and the norm of a gradient."""
        if state is not None:
            self.steps += 1
            self._state = CoreState(*([np.asarray(x) for x in part] if isinstance(part, list) else np.asarray(part)
                                      for part in state.detach()))
            vectors = self._state[:3]
            self._bad = (any(np.isnan(x).any() for x in vectors), any(np.isinf(x).any() for x in vectors))
            self._energies.append(sum(float(np.square(x, dtype=np.float64).sum()) for x in vectors))
        if gradient_norm is not None:
            self._gradients.append(float(gradient_norm))

    def _spiked(self):
        *earlier, last = self._gradients or [0.0]
        return bool(earlier) and not last <= self.spike * float(np.median(earlier))

    def stability(self):
        """``is_stable`` and everything it rests on."""
        energies = list(self._energies) or [0.0]
        rate = energies[-1] - energies[-2] if len(energies) > 1 else 0.0
        nan, inf = self._bad
        within = energies[-1] < self.lyapunov_threshold
        breach = rate < self.dissipation_floor
        checks = [{"name": name, "ok": bool(ok)} for name, ok in
                  (("finite", not nan and not inf), ("energy", within), ("gradient", not self._spiked()))]
        return {
            "is_stable": all(check["ok"] for check in checks), "has_nan": nan, "has_inf": inf,
            "lyapunov_current": energies[-1], "lyapunov_mean": float(np.mean(energies)),
            "lyapunov_threshold": self.lyapunov_threshold, "dissipation_rate": rate,
            "dissipation_floor": self.dissipation_floor, "dissipation_breach": breach,
            "state_norm": math.sqrt(energies[-1]) if energies[-1] >= 0 else math.nan,
            "gradient_norm": self._gradients[-1] if self._gradients else 0.0, "gradient_spike": self._spiked(),
            "steps": self.steps, "component_checks": checks,
        }  # fmt: skip

    def metrics(self, learning_rate=0.0, learning_progress=None):
        """The published metrics: energies, norms, share of slots in use at each level."""
        parts = self._state[:3] if self._state else [np.zeros(1)] * 3
        memories, keys = (self._state.memories, self._state.keys) if self._state else ([], [])
        energy = [float(np.square(x, dtype=np.float64).sum()) for x in parts]
        held = float(sum(np.square(x, dtype=np.float64).sum() for x in memories))
        return {
            "lyapunov": {"total": sum(energy) + held, "fast": energy[0], "memory": held, "params": 0.0},
            "state_norms": dict(zip("swp", map(math.sqrt, energy))),
            "cms_utilization": [float((np.square(x).sum(-1) > 0).mean()) for x in keys],
            "learning_rate": learning_rate, "steps": self.steps,
            "gradient_norm": self._gradients[-1] if self._gradients else 0.0, "gradient_spike": self._spiked(),
            "timestamp": time.time(), "learning_progress": dict(learning_progress or {}),
        }  # fmt: skip
