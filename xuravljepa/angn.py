"""ANGN, adaptive neural gating: one gate in front of each layer's mixer.

    z = norm(h),   g = 2 σ(w ∘ z + b_modality),   mixer input = g ∘ z

w and b start at zero, so a new gate is exactly the identity.  The gate sits inside the residual branch:
the stream itself is never gated, and nothing is remembered between calls.
"""

import numpy as np

from xuracore import nn, ops
from xuracore.nn import init

QUERY, VISUAL, TOOL, READ = range(4)  # which kind of token a position holds


class Gate(nn.Module):
    """Elementwise gate over (B, L, d).

    weight (d), bias (4, d): one row per modality.  ``activation`` holds the mean of g/2 per sample of
    the last call (0.5 at the start), padding left out: what the agent's monitor looks at.
    """

    def __init__(self, dim):
        self.weight = nn.Parameter(init.zeros(dim))
        self.bias = nn.Parameter(init.zeros((4, dim)))
        self._activation = None

    def forward(self, z, modality, mask=None):
        """z (B, L, d), modality (L,) integers, mask (B, L) True for real tokens, or None → (B, L, d)."""
        half = ops.sigmoid(z * self.weight + ops.embedding(self.bias, modality))
        share = half.data.mean(axis=2, dtype=np.float64)
        mask = np.ones(share.shape, bool) if mask is None else mask
        self._activation = (share * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
        return z * (half * 2.0)

    @property
    def activation(self):
        """(B,) float64 mean of σ over real positions and features, of the last call."""
        return self._activation

    def regulariser(self):
        """mean over modalities and features of (2σ(b) - 1)²: keeps the gate near open."""
        deviation = ops.sigmoid(self.bias) * 2.0 - 1.0
        return (deviation * deviation).mean()


def context_reset(activations, threshold=0.15):
    """(B,) bool: samples whose mean gate over the layers fell below ``threshold``, a sign to start afresh."""
    return np.mean(activations, axis=0) < threshold
