"""Sequence models with a state: every layer is ``y, state = mixer(x, state=None)``."""

from xuramamba.mamba3 import Mamba3, Mamba3Config, Mamba3State

__all__ = ["Mamba3", "Mamba3Config", "Mamba3State"]
