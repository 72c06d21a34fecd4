"""Where a patch is: tables of sines, tables interpolated to other sizes, and rotary angles along three axes."""

import numpy as np

from xuracore.ops.resize import resize_matrix

INTERPOLATIONS = {
    "hf": "bicubic, a = -0.75, no antialias: Hugging Face's ViT, DINOv2 and I-JEPA",
    "timm": "bicubic, a = -0.5, antialiased: timm, and DINOv2 with registers",
    "dinov2": "as hf, but places lie old / (new + 0.1) apart: the original DINOv2 without registers",
}


class Rotary:
    """V-JEPA 2's rotary positions: ``Rotary(...)(x)`` turns queries or keys x (B, heads, L, width).

    ids (L,) : numbers of the tokens in the whole clip, so that frame = id // side², row and column follow.
    A head has three slices of 2 ((width // 3) // 2) features, for frame, row and column; the rest stands still.
    In a slice of s features the rates are 10000^(-2j/s), j < s/2, once for the first half and again for the
    second, while pairs are neighbours: the two features of a pair may turn at different rates.  That is how
    the released weights were trained.
    """

    def __init__(self, ids, side, width, dtype=np.float32):
        part = 2 * ((width // 3) // 2)
        rates = 10000.0 ** (-2 * np.arange(part // 2) / part)
        places = ids // side**2, ids % side**2 // side, ids % side
        angles = np.zeros((len(ids), width))
        for i, place in enumerate(places):
            angles[:, i * part : (i + 1) * part] = np.tile(place[:, None] * rates, 2)
        self.cos, self.sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        self.swap = np.zeros((width, width), dtype)  # x @ swap: (x0, x1) → (-x1, x0)
        even = np.arange(0, width - 1, 2)
        self.swap[even + 1, even], self.swap[even, even + 1] = -1, 1

    def __call__(self, x):
        return x * self.cos + (x @ self.swap) * self.sin


def sine_positions(side, dim):
    """(1, 1 + side², dim) float32: where the learned positions start.

    Sines and cosines of row and column (He et al. 2022, MAE): the product of two positions depends on
    their distance alone, so that attention can tell near from far before it has learned anything.
    """
    quarter = dim // 4
    frequency = 1 / 10000 ** (np.arange(quarter) / max(quarter, 1))
    place = np.arange(side)[:, None] * frequency
    wave = np.concatenate([np.sin(place), np.cos(place)], axis=1)  # (side, 2 · quarter)
    table = np.zeros((1 + side * side, dim), np.float32)
    table[1:, : 2 * quarter] = np.repeat(wave, side, axis=0)
    table[1:, 2 * quarter : 4 * quarter] = np.tile(wave, (side, 1))
    return table[None]


def bicubic_matrix(old, new, interpolation="hf"):
    """(new, old) float32: resampling of ``old`` places to ``new``, see INTERPOLATIONS.

    Cubic convolution (Keys 1981) with half-pixel centres and clamped borders.
    """
    if interpolation == "timm":
        return resize_matrix(old, new, "bicubic", antialias=True).astype(np.float32)
    if interpolation == "hf":
        return resize_matrix(old, new, "bicubic").astype(np.float32)
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / (new + 0.1) - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centres - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix.astype(np.float32)
