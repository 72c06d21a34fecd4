"""One record per op, and the function that runs it.

From this table come the gradient checks, the dtype checks, the table of ops in the documentation
and the labels of the profiler.  An op without vjp, reference or samples cannot be registered.
"""

from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from xuracore.autograd import Node, Output, is_grad_enabled
from xuracore.tensor import Tensor

REGISTRY = {}


@dataclass(frozen=True)
class Primitive:
    """Everything there is to know about one op.

    forward(*arrays, **attributes) -> (output, saved); a tuple of outputs if ``outputs`` > 1.
    vjp(grad, saved, needs) -> one gradient per positional input, None where not needed.
    reference(*arrays, **attributes) -> output(s), plain NumPy in float64: what the op means.
    samples(rng) -> iterable of (inputs, attributes), small and float64, edge cases included.
    tolerance : relative difference allowed between the float32 op and its reference.
    """

    name: str
    forward: Callable
    vjp: Callable
    reference: Callable
    samples: Callable
    outputs: int = 1
    tolerance: float = 1e-5
    weak: bool = False  # constant arrays take the dtype of the tensors they meet
    differentiable: bool = field(default=True)


def primitive(name, forward, vjp, *, reference, samples, outputs=1, tolerance=1e-5, weak=False):
    """Register an op and return the function users call.

    That function takes Tensors, arrays, numbers or None by position and attributes by keyword.  If
    no input is a Tensor, plain arrays come out and nothing is recorded.  Where an array meets a
    Tensor it is a constant and takes the Tensor's float type.
    """
    if name in REGISTRY:
        raise ValueError(f"an op named {name!r} is already registered")
    record = Primitive(name, forward, vjp, reference, samples, outputs, tolerance, weak)
    REGISTRY[name] = record
    build = _several_outputs if outputs > 1 else _one_output
    call = build(record)
    call.__name__ = call.__qualname__ = name
    call.__doc__ = forward.__doc__ or reference.__doc__
    call.primitive = record
    return call


def _arrays(inputs, weak):
    """Arrays of ``inputs``, their nodes, and whether any was a Tensor (None, None, False if not)."""
    arrays, parents, dtype, recorded = [], [], None, False
    for x in inputs:
        if isinstance(x, Tensor):
            data, node = x.data, x.node
            if dtype is None or data.dtype.itemsize > dtype.itemsize and data.dtype.kind == "f":
                dtype = data.dtype if data.dtype.kind == "f" else dtype
            arrays.append(data)
            parents.append(node)
            if node is not None:
                recorded = True
        else:
            arrays.append(x)
            parents.append(None)
    if dtype is not None:
        for i, x in enumerate(arrays):
            if type(x) is float or type(x) is int or x is None:
                continue
            if inputs[i] is x and not isinstance(x, np.ndarray):
                if isinstance(x, (np.generic, list, tuple)):
                    x = arrays[i] = np.asarray(x)
                else:
                    continue
            if x.dtype != dtype and (x.dtype.kind == "f" and inputs[i] is x or weak and x.dtype.kind in "iu"):
                arrays[i] = x.astype(dtype)
    return arrays, parents, recorded


def _one_output(record):
    forward, weak = record.forward, record.weak
    new_tensor, blank = Tensor.__new__, Tensor

    def call(*inputs, **attributes):
        for x in inputs:
            if isinstance(x, Tensor):
                break
        else:
            return forward(*inputs, **attributes)[0]
        arrays, parents, recorded = _arrays(inputs, weak)
        data, saved = forward(*arrays, **attributes)
        if type(data) is not np.ndarray:
            data = np.asarray(data)
        result = new_tensor(blank)
        result.data = data
        if recorded and is_grad_enabled():
            result.node = Node(record, parents, saved, data.shape, data.dtype)
        else:
            result.node = None
        return result

    return call


def _several_outputs(record):
    forward, weak = record.forward, record.weak

    def call(*inputs, **attributes):
        if not any(isinstance(x, Tensor) for x in inputs):
            return forward(*inputs, **attributes)[0]
        arrays, parents, recorded = _arrays(inputs, weak)
        outputs, saved = forward(*arrays, **attributes)
        results = tuple(Tensor(data) for data in outputs)
        if recorded and is_grad_enabled():
            node = Node(record, parents, saved, None, None)
            for index, result in enumerate(results):
                result.node = Output(node, index, result.data)
        return results

    return call
