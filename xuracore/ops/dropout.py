"""Dropout (Srivastava et al. 2014)."""

import numpy as np

from xuracore.errors import ConfigError
from xuracore.ops.elementwise import multiply
from xuracore.recompute import drawing_from


def dropout(x, rate, *, rng, training=True):
    """Each element set to 0 with probability ``rate``, the others multiplied by 1 / (1 - rate).

    rng : the numpy Generator to draw from.  With ``training`` False, or a rate of 0, x itself.
    Raises ConfigError unless 0 ≤ rate < 1.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"dropout rate is {rate}; expected 0 ≤ rate < 1")
    if not training or rate == 0:
        return x
    drawing_from(rng)  # a checkpoint around will have to draw the same again
    keep = rng.random(x.shape, dtype=np.float32) >= rate
    return multiply(x, (keep / np.float32(1 - rate)).astype(x.dtype))
