"""Gives Tensor its operators and methods.  Imported once, by :mod:`xuracore.ops`."""

import numpy as np

from xuracore.ops import activation, cumulate, elementwise, index, linalg, reduce, shape
from xuracore.ops.registry import of_one
from xuracore.tensor import Tensor


def _reversed(op):
    def call(self, other):
        return op(other, self)

    return call


def _compare(ufunc):
    """Comparison of the values, element by element: an array of bool, off the tape."""

    def call(self, other):
        return ufunc(self.data, other.data if isinstance(other, Tensor) else other)

    return call


def _reshape(self, *sizes):
    """The same elements in another shape: ``x.reshape(2, -1)`` or ``x.reshape((2, -1))``."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return shape.reshape(self, shape=sizes)


def _transpose(self, *axes):
    """Permute the axes; without arguments, reverse them."""
    if len(axes) == 1 and isinstance(axes[0], (tuple, list)):
        axes = tuple(axes[0])
    return shape.transpose(self, axes=axes or None)


def _reduction(op):
    whole = of_one(op.primitive, op)

    def call(self, axis=None, keepdims=False, **settings):
        if axis is None and not keepdims and not settings:
            return whole(self)
        return op(self, axis=axis, keepdims=keepdims, **settings)

    call.__doc__ = op.__doc__
    return call


METHODS = {
    "__add__": elementwise.add,
    "__radd__": _reversed(elementwise.add),
    "__sub__": elementwise.subtract,
    "__rsub__": _reversed(elementwise.subtract),
    "__mul__": elementwise.multiply,
    "__rmul__": _reversed(elementwise.multiply),
    "__truediv__": elementwise.divide,
    "__rtruediv__": _reversed(elementwise.divide),
    "__pow__": elementwise.power,
    "__rpow__": _reversed(elementwise.power),
    "__mod__": elementwise.remainder,
    "__rmod__": _reversed(elementwise.remainder),
    "__neg__": elementwise.negative,
    "__abs__": elementwise.absolute,
    "__matmul__": linalg.matmul,
    "__rmatmul__": _reversed(linalg.matmul),
    "__getitem__": lambda self, key: index.getitem(self, key=index.plain_key(key)),
    "__lt__": _compare(np.less),
    "__le__": _compare(np.less_equal),
    "__gt__": _compare(np.greater),
    "__ge__": _compare(np.greater_equal),
    "__eq__": _compare(np.equal),
    "__ne__": _compare(np.not_equal),
    "reshape": _reshape,
    "transpose": _transpose,
    "permute": _transpose,
    "swapaxes": shape.swapaxes,
    "moveaxis": shape.moveaxis,
    "squeeze": shape.squeeze,
    "unsqueeze": shape.unsqueeze,
    "flatten": shape.flatten,
    "split": shape.split,
    "chunk": shape.chunk,
    "sum": _reduction(reduce.sum),
    "mean": _reduction(reduce.mean),
    "max": _reduction(reduce.max),
    "min": _reduction(reduce.min),
    "prod": _reduction(reduce.prod),
    "var": _reduction(reduce.var),
    "std": _reduction(reduce.std),
    "norm": _reduction(reduce.norm),
    "argmax": reduce.argmax,
    "argmin": reduce.argmin,
    "any": reduce.any,
    "all": reduce.all,
    "cumsum": lambda self, axis=-1: cumulate.cumsum(self, axis=axis),
    "abs": elementwise.absolute,
    "exp": elementwise.exp,
    "log": elementwise.log,
    "sqrt": elementwise.sqrt,
    "sin": elementwise.sin,
    "cos": elementwise.cos,
    "clip": lambda self, low=None, high=None: elementwise.clip(self, low=low, high=high),
    "tanh": activation.tanh,
    "sigmoid": activation.sigmoid,
    "relu": activation.relu,
    "astype": lambda self, dtype: shape.astype(self, dtype=np.dtype(dtype)),
}

for _name, _function in METHODS.items():
    setattr(Tensor, _name, _function)
