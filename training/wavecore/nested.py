"""Nested learning: groups of parameters that change every step, every 16 and every 256.

Each group sums the gradients of all steps since its last change and takes their mean, so that a slow group
sees a long stretch of experience before it moves (Behrouz et al., Nested Learning, 2025).
"""

import math

import numpy as np

from training.optim import Adam, clip_grad_norm
from xuracore.config import require
from xuracore.errors import GradError
from xuramamba.wavecore.parameters import flatten

PERIODS = {"fast": 1, "mid": 16, "slow": 256}
RATES = {"fast": 1.0, "mid": 0.5, "slow": 0.2}  # of the learning rate
_GROUPS = {
    "fast": ("decoder/", "heads/", "core/u_p/", "core/u_w/", "core/gate/"),
    "mid": ("core/", "write/"),
    "slow": ("encoder/", "cms/"),
}


def group_of(name):
    """The group of a parameter: decoder and mixing are fast, the core is mid, encoder and memory are slow."""
    return next(group for group, prefixes in _GROUPS.items() if name.startswith(prefixes))


class NestedAdam:
    """Adam for each group on its own clock.

    params : tree of Parameters.   periods : {"fast", "mid", "slow"} → steps from change to change.
    clip : largest norm of a group's mean gradient.
    """

    def __init__(self, params, lr=1e-3, periods=None, rates=None, clip=10.0):
        self.periods, self.rates = {**PERIODS, **(periods or {})}, {**RATES, **(rates or {})}
        require(set(self.periods) == set(PERIODS) == set(self.rates), f"groups are {', '.join(PERIODS)}")
        require(all(type(n) is int and n > 0 for n in self.periods.values()),
                f"periods={self.periods}; expected positive whole numbers")
        members = {group: [] for group in PERIODS}
        for name, parameter in flatten(params).items():
            members[group_of(name)].append((name, parameter))
        self.optimizers = {g: Adam(pairs, lr=lr) for g, pairs in members.items() if pairs}
        self.lr, self.clip, self.steps = lr, clip, 0
        self._sums = {g: 0 for g in self.optimizers}  # gradients taken in since the last change

    def zero_grad(self):
        """Nothing to do: gradients are summed until their group changes."""

    def step(self, factor=1.0):
        """Count one step of gradients already added by ``backward``; change the groups that are due.

        Returns the names of those groups.  GradError, with nothing changed and the gradients of this stretch
        dropped, if a gradient is NaN or infinite.
        """
        self.steps += 1
        due = [g for g in self.optimizers if self.steps % self.periods[g] == 0]
        for group, optimizer in self.optimizers.items():
            self._sums[group] += 1
        norms = {}
        for group in due:
            optimizer = self.optimizers[group]
            for parameter in optimizer.parameters():
                if parameter.grad is not None and self._sums[group] > 1:
                    parameter.grad = parameter.grad * np.asarray(1 / self._sums[group], parameter.dtype)
            norms[group] = clip_grad_norm(optimizer.parameters(), self.clip)
        if not all(math.isfinite(norm) for norm in norms.values()):
            for group in due:
                self._forget(group)
            raise GradError(f"step {self.steps}: a gradient is not finite (norms {norms}); look at the inputs, or "
                            "take a smaller learning rate")
        for group in due:
            self.optimizers[group].step(self.lr * self.rates[group] * factor)
            self._forget(group)
        return due

    def _forget(self, group):
        self.optimizers[group].zero_grad()
        self._sums[group] = 0
