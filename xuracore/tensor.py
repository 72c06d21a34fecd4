"""Tensor: an array with a place on the tape.  Nothing numerical happens here.

Operators and methods (``a + b``, ``a.sum()``) are attached by :mod:`xuracore.ops.methods`, so that
this file needs no op and every op may need this file.
"""

import numpy as np

from xuracore import autograd
from xuracore.errors import DTypeError, GradError, ShapeError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class Tensor:
    """An ndarray, and the tape node that made it.

    data : an array, referred to and not copied; or numbers and lists of them, of which floats become float32.
    requires_grad : record what is done with this tensor, and give it a gradient on ``backward``.

    ``node`` is None for constants, a :class:`~xuracore.autograd.Leaf` for tensors the user asked
    gradients of, and a :class:`~xuracore.autograd.Node` for results of ops.
    """

    __slots__ = ("data", "node", "__weakref__")
    __array_priority__ = 1000  # ndarray + Tensor asks the Tensor
    __array_ufunc__ = None
    __hash__ = object.__hash__  # == compares elements; in a set or dict a tensor is itself and no other

    def __init__(self, data, requires_grad=False):
        if type(data) is not np.ndarray:
            data = data.data if isinstance(data, Tensor) else _array(data)
        self.data = data
        self.node = None
        if requires_grad:
            self.requires_grad_()

    # ------------------------------------------------------------------ what it is
    @property
    def shape(self):
        return self.data.shape

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def ndim(self):
        return self.data.ndim

    @property
    def size(self):
        return self.data.size

    @property
    def T(self):
        return self.transpose()

    @property
    def is_leaf(self):
        return self.node is None or type(self.node) is autograd.Leaf

    def numpy(self):
        """The array itself (shared memory)."""
        return self.data

    def item(self):
        """The single element as a Python number; ShapeError if there is not exactly one."""
        if self.data.size != 1:
            raise ShapeError(f"item() needs exactly one element; this tensor has shape {self.shape}")
        return self.data.item()

    def __len__(self):
        if not self.data.ndim:
            raise DTypeError("a 0-d tensor has no length")
        return len(self.data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __setitem__(self, key, value):
        raise DTypeError(
            "a tensor is not assigned to: what was computed from it could not know; use ops.where or "
            "ops.concatenate, or, for a leaf outside a graph, .data[...] = value"
        )

    def __bool__(self):
        return bool(self.data)

    def __float__(self):
        return float(self.item())

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad and autograd.is_grad_enabled():
            raise GradError("this tensor is on the tape; NumPy would lose its gradient: use .data or an op")
        return np.array(self.data, dtype=dtype, copy=copy)

    def __repr__(self):
        text = np.array2string(self.data, separator=", ", prefix="Tensor(")
        mark = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({text}, dtype={self.dtype}{mark})"

    # ------------------------------------------------------------------ gradients
    @property
    def requires_grad(self):
        return self.node is not None

    @property
    def grad(self):
        """Gradient of a leaf after ``backward()``, or None.  Treat as read-only: it may be shared."""
        return self.node.grad if type(self.node) is autograd.Leaf else None

    @grad.setter
    def grad(self, value):
        if type(self.node) is not autograd.Leaf:
            raise GradError("only a leaf that requires gradients has .grad")
        if value is not None:
            value = np.asarray(value, dtype=self.dtype)
            if value.shape != self.shape:
                raise ShapeError(f"gradient has shape {value.shape}; the tensor has {self.shape}")
        self.node.grad, self.node.owned = value, False

    def requires_grad_(self, value=True):
        """Switch recording on or off for this leaf; returns the tensor."""
        if not self.is_leaf:
            raise GradError("requires_grad_ is for leaves; this tensor is the result of an op: use .detach()")
        if not value:
            self.node = None
        elif self.node is None:
            if self.dtype not in FLOATS:
                raise DTypeError(f"gradients need float32 or float64; this tensor is {self.dtype}")
            self.node = autograd.Leaf(self.data)
        return self

    def backward(self, grad=None):
        """Accumulate into ``.grad`` of every leaf the derivative of this tensor.

        grad : cotangent with this tensor's shape; may be left out for a tensor of one element.
        Raises GradError if nothing was recorded, or if the graph was already used.
        """
        autograd.backward(self, grad)

    def detach(self):
        """The same data, off the tape."""
        return Tensor(self.data)


def tensor(data, dtype=None, requires_grad=False):
    """A new Tensor; Python numbers and lists become float32, integers and booleans stay what they are.

    dtype : forces the element type.  The data is copied, so later changes to it do not matter here.
    """
    data = data.data if isinstance(data, Tensor) else data
    return Tensor(np.array(_array(data) if dtype is None else data, dtype=dtype), requires_grad)


def _array(data):
    """``data`` as an array; Python's floats, which say nothing about precision, become float32."""
    array = np.asarray(data)
    if array.dtype == np.float64 and not isinstance(data, (np.ndarray, np.generic)):
        return array.astype(np.float32)
    return array
