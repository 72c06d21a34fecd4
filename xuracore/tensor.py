"""Tensor: an array with a place on the tape.  Nothing numerical happens here.

Operators and methods (``a + b``, ``a.sum()``) are attached by :mod:`xuracore.ops.methods`, so that
this file needs no op and every op may need this file.
"""

import numpy as np

from xuracore import autograd, versions
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

    def backward(self, grad=None, retain_graph=False, create_graph=False):
        """Accumulate into ``.grad`` of every leaf the derivative of this tensor.

        grad : cotangent with this tensor's shape; may be left out for a tensor of one element.
        retain_graph : keep what the graph saved, so that ``backward`` can run through it again.
        Raises GradError if nothing was recorded, if the graph was already used, if something it saved has
        been changed in place since, or for ``create_graph``: second derivatives are not a feature of the tape.
        """
        autograd.backward(self, grad, retain_graph, create_graph)

    def register_hook(self, hook):
        """Call ``hook(gradient)`` whenever a backward pass has the whole gradient of this tensor.

        hook : takes an array, not to be changed; returns None, or an array that takes its place.
        Returns a handle: ``handle.remove()``, or ``with tensor.register_hook(f):``.
        Raises GradError for a tensor without gradient.
        """
        if self.node is None:
            raise GradError("register_hook needs a tensor with a gradient; this one is a constant")
        if self.node.hooks is None:
            self.node.hooks = {}
        return Handle(self.node.hooks, hook)

    def detach(self):
        """The same data, off the tape."""
        return Tensor(self.data)

    # ------------------------------------------------------------------ in place
    # A leaf that requires gradients is changed under no_grad, a constant at any time, the result of an
    # op never.  Each change raises the version that a backward pass compares.
    def __setitem__(self, key, value):
        key = key.data if isinstance(key, Tensor) else key
        self._writable("assignment to elements", value)[key] = autograd._data(value)
        self.mark_changed()

    def copy_(self, value):
        """Take over the numbers of ``value``, which broadcasts to this shape; returns the tensor."""
        self[...] = value
        return self

    def add_(self, value, scale=1.0):
        """Add ``scale`` times ``value`` in place; returns the tensor."""
        data, value = self._writable("add_", value), autograd._data(value)
        data += value if scale == 1 else np.multiply(value, scale, dtype=data.dtype)
        return self.mark_changed()

    def mul_(self, value):
        """Multiply by ``value`` in place; returns the tensor."""
        data = self._writable("mul_", value)
        data *= autograd._data(value)
        return self.mark_changed()

    def zero_(self):
        """Set every element to 0; returns the tensor."""
        self[...] = 0
        return self

    def mark_changed(self):
        """Say that ``data`` was written to directly; returns the tensor.

        A backward pass through an op that saved the earlier numbers then raises GradError.  The methods
        that change a tensor, the optimizers and ``load_state_dict`` do this by themselves.
        """
        versions.changed(self.data, getattr(self, "name", None))
        return self

    @property
    def version(self):
        """How often this memory was changed in place, as far as it was said (see :meth:`mark_changed`)."""
        return versions.version(self.data)

    def _writable(self, action, value):
        """The array to write to, or GradError if a gradient would become wrong or get lost."""
        if not self.is_leaf:
            raise GradError(
                f"{action}: this tensor is the result of an op, and its gradient could not know; use ops.where "
                "or ops.concatenate, or change a copy: xc.tensor(x)"
            )
        if autograd.is_grad_enabled():
            if self.node is not None:
                raise GradError(
                    f"{action} on a tensor that requires gradients: do it inside `with xc.no_grad():`, or use "
                    "ops.where for a result with a gradient"
                )
            if isinstance(value, Tensor) and value.requires_grad:
                raise GradError(f"{action}: the gradient of the value would get lost; give value.detach()")
        return self.data


class Handle:
    """What registering a function returns: ``remove()`` takes it out again; also a context manager."""

    __slots__ = ("functions", "key")

    def __init__(self, functions, function):
        self.functions, self.key = functions, object()
        functions[self.key] = function

    def remove(self):
        """Take the function out; nothing happens the second time."""
        self.functions.pop(self.key, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()


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
