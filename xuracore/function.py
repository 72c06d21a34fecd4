"""Ops of one's own: a forward function in NumPy and its vector-Jacobian product, side by side."""

import inspect

import numpy as np

from xuracore.errors import GradError, ShapeError
from xuracore.ops.registry import Primitive, recorded


class Function:
    """A differentiable op written by its user; call it by ``apply``.

        class Cube(xc.Function):
            def forward(save, x, *, scale=1.0):
                save(x, scale)
                return scale * x**3

            def vjp(grad, saved, needs):
                x, scale = saved
                return 3 * scale * grad * x * x

        y = Cube.apply(x, scale=2.0)
        xc.gradcheck(Cube.apply, [np.array([0.5, -2.0])])       # in float64, against differences

    forward(save, *arrays, **attributes) : computes with plain arrays, changes none of them, and returns an
        array, or a tuple of ``outputs`` of them.  ``save(...)`` keeps what the vjp needs, and is called once
        or not at all; what is not saved is freed.
    vjp(grad, saved, needs) : the gradient of every positional input, from the gradient ``grad`` of the output
        (a tuple, if there are several): an array if there is one input, else a tuple.  ``needs[i]`` is false
        where a gradient is not wanted; None stands for such a one, or for zero.

    Each gradient has the dtype of its input, and its shape or that of an output to which it was broadcast (then
    it is summed back).  GradError says which of them is wrong.
    """

    outputs = 1

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        for name in ("forward", "vjp"):
            if name in vars(cls) and not isinstance(vars(cls)[name], staticmethod):
                setattr(cls, name, staticmethod(vars(cls)[name]))
        if cls.forward is not Function.forward and cls.vjp is not Function.vjp:
            cls.apply = staticmethod(_op(cls))

    @staticmethod
    def forward(save, *arrays, **attributes):
        """The result, from plain arrays."""
        raise NotImplementedError

    @staticmethod
    def vjp(grad, saved, needs):
        """The gradient of each input."""
        raise NotImplementedError

    @staticmethod
    def apply(*inputs, **attributes):
        """Call the op; every subclass with a ``forward`` and a ``vjp`` has its own."""
        raise GradError("a Function needs both a forward and a vjp before it can be applied")


def _op(function):
    name, count = function.__name__, function.outputs

    def forward(*arrays, **attributes):
        kept = []
        result = function.forward(lambda *values: kept.append(values), *arrays, **attributes)
        if len(kept) > 1:
            raise GradError(f"the forward of {name!r} called save {len(kept)} times; give it everything at once")
        results = result if count > 1 else (result,)
        if not isinstance(results, tuple) or len(results) != count:
            given = f"{len(results)} of them" if isinstance(results, tuple) else type(result).__name__
            raise GradError(f"the forward of {name!r} has to return a tuple of {count} arrays; it gave {given}")
        results = tuple(_array(x, f"the forward of {name!r} returned") for x in results)
        templates = tuple((x.shape, x.dtype) for x in results)
        return results if count > 1 else results[0], (kept[0] if kept else (), templates)

    def vjp(grad, saved, needs):
        values, templates = saved
        if count > 1:  # an output nobody used has gradient zero
            grad = tuple(np.zeros(*like) if g is None else g for g, like in zip(grad, templates))
        wanted = tuple(need is not None and need is not False for need in needs)
        given = function.vjp(grad, values, wanted)
        if not isinstance(given, (tuple, list)):
            given = (given,)
        if len(given) != len(needs):
            raise GradError(f"the vjp of {name!r} returned {len(given)} gradients for {len(needs)} inputs")
        return [
            _gradient(name, i, x, need, [shape for shape, _ in templates]) if want else None
            for i, (x, need, want) in enumerate(zip(given, needs, wanted))
        ]

    signature = inspect.signature(function.forward)
    forward.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    record = Primitive(name, forward, vjp, reference=None, samples=None, outputs=count)
    apply = recorded(record)
    apply.__doc__, apply.primitive = function.__doc__, record
    return apply


def _array(x, who):
    if not isinstance(x, (np.ndarray, np.generic)):
        raise GradError(f"{who} {type(x).__name__}; expected an array (inside a Function everything is NumPy)")
    return np.asarray(x)


def _gradient(name, i, x, need, broadcast):
    if x is None:
        return None
    x = _array(x, f"the vjp of {name!r} returned for input {i} a")
    dtype = getattr(need, "dtype", x.dtype)
    if x.dtype != dtype:
        raise GradError(
            f"the vjp of {name!r} returned {x.dtype} for input {i}, which is {dtype}: look for a NumPy number "
            "or an array of another precision in it"
        )
    shape = getattr(need, "shape", x.shape)
    if x.shape != shape and x.shape not in broadcast:
        raise ShapeError(f"the vjp of {name!r} returned shape {x.shape} for input {i}, which has shape {shape}")
    return x
