"""Weights at fewer bits, for inference: the layers compute in float32 and read bfloat16, int8 or int4.

Rounding (``w`` a weight, ``ŵ`` what is read back, s the scale of its group of 32 inputs of one row):

    bfloat16   to the nearest, ties to even: |w - ŵ| ≤ |w| / 256
    int8       s = max|w| / 127, rounded up to a bfloat16 number: |w - ŵ| ≤ s / 2
    int4       s = max|w| / 7, rounded up likewise: |w - ŵ| ≤ s / 2
"""

import numpy as np

from xuracore.autograd import is_grad_enabled
from xuracore.errors import ConfigError, DTypeError, GradError, ShapeError
from xuracore.io import from_bfloat16, to_bfloat16
from xuracore.kernels import gemv as kernels
from xuracore.nn import init
from xuracore.nn.module import Module, Parameter
from xuracore.tensor import Tensor

WIDTHS = ("float32", "bfloat16", "int8", "int4")
FEW = 8  # vectors up to which weights are read where they are; more of them are worth a dequantised copy
ROWS = 512  # of that copy at a time
TASKS = 16


def pack(weight, width):
    """``(weight, scales)`` in the layout of :mod:`xuracore.kernels.gemv` for a float32 (rows, K) matrix.

    int8 and int4 need K to be a multiple of 32.  Raises ConfigError, ShapeError.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    if width not in WIDTHS:
        raise ConfigError(f"width is {width!r}; expected one of {', '.join(WIDTHS)}")
    if weight.ndim != 2:
        raise ShapeError(f"pack: the weight has shape {weight.shape}; expected (rows, K)")
    none, blank = np.empty((0, 0, 0), np.uint16), init.is_blank()
    if width == "float32":
        return weight, none
    if width == "bfloat16":
        return (np.zeros(weight.shape, np.uint16) if blank else to_bfloat16(weight)), none
    rows, size = weight.shape
    if size % kernels.GROUP:
        raise ShapeError(f"pack: {size} columns; {width} needs a multiple of {kernels.GROUP}")
    panels = -(-rows // kernels.PANEL)
    if blank:
        kind, lanes = (np.int8, kernels.PANEL) if width == "int8" else (np.uint8, kernels.HALF)
        scales = np.zeros((panels, size // kernels.GROUP, kernels.PANEL), np.uint16)
        return np.zeros((panels, size, lanes), kind), scales
    padded = np.zeros((panels * kernels.PANEL, size), np.float32)
    padded[:rows] = weight
    by_panel = padded.reshape(panels, kernels.PANEL, size).swapaxes(1, 2)
    groups = by_panel.reshape(panels, size // kernels.GROUP, kernels.GROUP, kernels.PANEL)
    most = 127 if width == "int8" else 7
    scales = _bfloat16_upward(np.abs(groups).max(axis=2) / np.float32(most))
    divisor = from_bfloat16(scales)[:, :, None]
    q = np.rint(np.divide(groups, divisor, out=np.zeros_like(groups), where=divisor != 0)).astype(np.int8)
    q = np.ascontiguousarray(np.clip(q, -most, most).reshape(panels, size, kernels.PANEL))
    if width == "int8":
        return q, scales
    q = (q + np.int8(8)).view(np.uint8)
    return np.ascontiguousarray(q[:, :, : kernels.HALF] | q[:, :, kernels.HALF :] << 4), scales


def _bfloat16_upward(x):
    """Bits of the least bfloat16 number not below x ≥ 0."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


class Stored(Module):
    """A packed matrix: buffers ``weight`` and, for int8 and int4, ``scales``."""

    def __init__(self, weight, width):
        self.width, self.shape = width, tuple(weight.shape)
        stored, scales = pack(weight, width)
        self.register_buffer("weight", stored)
        if scales.size:
            self.register_buffer("scales", scales)
        else:
            self.scales = scales

    def dense(self, first=0, last=None):
        """The matrix as it is read back, float32 (rows, K), or some of its rows."""
        last = self.shape[0] if last is None else min(last, self.shape[0])
        if self.weight.ndim == 2:
            return kernels.dequantised(self.weight[first:last], self.scales)
        start, stop = first // kernels.PANEL, -(-last // kernels.PANEL)
        rows = kernels.dequantised(self.weight[start:stop], self.scales[start:stop])
        return rows[first - start * kernels.PANEL : last - start * kernels.PANEL]

    def to_dtype(self, dtype):
        """Stored weights are read as float32; DTypeError for anything else."""
        if np.dtype(dtype) != np.float32:
            raise DTypeError(f"{self.width} weights compute in float32, not {np.dtype(dtype)}")
        return super().to_dtype(dtype)

    def extra_repr(self):
        rows, size = self.shape
        return f"{size} → {rows}, {self.width}"


class QuantizedLinear(Stored):
    """y = x Wᵀ + b with a packed W; x (…, K) float32.  For inference: GradError where x is on the tape.

    >>> layer = QuantizedLinear(np.eye(32, dtype=np.float32), "int8")
    """

    def __init__(self, weight, width, bias=None):
        super().__init__(weight, width)
        self.bias = None if bias is None else Parameter(np.array(bias, np.float32), requires_grad=False)
        self._zeros = np.zeros(self.shape[0] if bias is None else 0, np.float32)

    def forward(self, x):
        data = x.data if isinstance(x, Tensor) else np.asarray(x)
        if isinstance(x, Tensor) and x.requires_grad and is_grad_enabled():
            raise GradError(f"{self.width} weights are for inference: call the model under no_grad()")
        rows, size = self.shape
        if data.shape[-1:] != (size,):
            raise ShapeError(f"QuantizedLinear: x {data.shape}, weight {self.shape}; expected (…, {size})")
        flat = np.ascontiguousarray(data, np.float32).reshape(-1, size)
        y = np.empty((len(flat), rows), np.float32)
        if 0 < len(flat) <= FEW:
            bias = self._zeros if self.bias is None else self.bias.data
            kernels.gemv.sized(self.weight.size)(self.weight, self.scales, bias, flat, TASKS, y)
        else:
            for first in range(0, rows, ROWS):
                y[:, first : first + ROWS] = flat @ self.dense(first, first + ROWS).T
            if self.bias is not None:
                y += self.bias.data
        y = y.reshape(*data.shape[:-1], rows)
        return Tensor(y) if isinstance(x, Tensor) else y


class QuantizedEmbedding(Stored):
    """Rows of a packed table: ids (…) → (…, K).  :meth:`project` is the product with its transpose."""

    def __init__(self, weight, width):
        super().__init__(weight, width)
        self._head = None

    def forward(self, ids):
        ids = np.asarray(ids)
        if self.weight.ndim == 2:
            rows = kernels.dequantised(self.weight[ids.reshape(-1)], self.scales)
        else:
            panels, lanes = np.divmod(ids.reshape(-1), kernels.PANEL)
            q = self.weight[panels, :, lanes % self.weight.shape[2]]
            if self.weight.dtype == np.uint8:
                q = (np.where(lanes[:, None] < kernels.HALF, q & 15, q >> 4)).astype(np.int8) - np.int8(8)
            scales = from_bfloat16(self.scales[panels, :, lanes])
            rows = q * np.repeat(scales, kernels.GROUP, axis=1)
        return Tensor(rows.reshape(*ids.shape, self.shape[1]))

    def project(self, hidden):
        """Scores (…, rows) of ``hidden`` (…, K): a tied head."""
        return QuantizedLinear.forward(self, hidden)

    bias = None

    @property
    def _zeros(self):
        return np.zeros(self.shape[0], np.float32)
