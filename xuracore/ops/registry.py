"""One record per op, and the function that runs it.

From this table come the gradient checks, the dtype checks, the table of ops in the documentation
and the labels of the profiler.  An op without vjp, reference or samples cannot be registered.
"""

import inspect
import weakref
from dataclasses import dataclass
from typing import Callable

import numpy as np

from xuracore.autograd import Node, Output, recording
from xuracore.tensor import Tensor
from xuracore.versions import next_number

REGISTRY = {}
_records = weakref.WeakSet()  # the registered ones, and those of the users' own Functions
_instruments = []  # what stands around every forward and vjp at the moment

_ndarray = np.ndarray
_new = object.__new__  # half the price of a Python __init__, at every op
_PYTHON_NUMBERS = (float, int)


@dataclass(eq=False)
class Primitive:
    """Everything there is to know about one op.

    forward(*arrays, **attributes) -> (output, saved); a tuple of outputs if ``outputs`` > 1.
    vjp(grad, saved, needs) -> one gradient per positional input; None, or anything, where needs[i] is false.
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
    weak: bool = False  # integer arrays take the float type they meet: they are numbers, not indices

    def __post_init__(self):
        self.bare = self.forward, self.vjp
        _records.add(self)
        self.dress()

    def dress(self):
        """Put the instruments that are open around ``forward`` and ``vjp``."""
        forward, vjp = self.bare
        for instrument in _instruments:
            forward, vjp = instrument(self, forward, vjp)
        self.forward, self.vjp = forward, vjp


def open_instrument(instrument):
    """Put ``instrument(record, forward, vjp) -> (forward, vjp)`` around every op until it is closed.

    Profiler and anomaly detection work by this; while none is open, an op pays nothing for them.
    """
    _instruments.append(instrument)
    _dress_all()


def close_instrument(instrument):
    """Take ``instrument`` off every op again."""
    _instruments.remove(instrument)
    _dress_all()


def _dress_all():
    for record in list(_records):
        record.dress()


class _Noted(tuple):
    """What an op saved, with remarks of an instrument; a vjp sees no difference."""


def note(saved, **remarks):
    """``saved`` with attributes for the backward pass to read; only tuples can carry them."""
    if type(saved) is tuple:
        saved = _Noted(saved)
    if type(saved) is _Noted:
        vars(saved).update(remarks)
    return saved


def primitive(name, forward, vjp, *, reference, samples, outputs=1, tolerance=1e-5, weak=False):
    """Register an op and return the function users call.

    That function takes Tensors, arrays, numbers or None by position and attributes by keyword (a Tensor
    given by keyword is put in its place).  If no input is a Tensor, plain arrays come out and nothing is
    recorded.  Where an array meets a Tensor it is a constant and takes the Tensor's float type.
    """
    if name in REGISTRY:
        raise ValueError(f"an op named {name!r} is already registered")
    record = Primitive(name, forward, vjp, reference, samples, outputs, tolerance, weak)
    REGISTRY[name] = record
    call = recorded(record)
    call.__doc__ = forward.__doc__ or reference.__doc__
    call.primitive = record
    return call


def recorded(record):
    """The function that calls ``record.forward`` and puts the call on the tape."""
    forward, outputs = record.bare[0], record.outputs
    parameters = inspect.signature(forward).parameters.values()
    places = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    call = (_several_outputs if outputs > 1 else _one_output)(record, places)
    if outputs == 1 and len(places) == len(parameters) and all(p.default is p.empty for p in places):
        if len(places) == 1:
            call = of_one(record, call)
        elif len(places) == 2 and record.weak:  # both are numbers; the second of ``getitem`` is an attribute
            call = _of_two(record, call)
    call.__name__ = call.__qualname__ = record.name
    return call


# ---------------------------------------------------------------------- any inputs
def _arrays(inputs, weak):
    """(arrays, nodes) of ``inputs``, constants in the Tensors' float type; nodes is None without Tensors."""
    arrays, nodes, float_type, tensors, loose = [], [], None, False, False
    for x in inputs:
        if isinstance(x, Tensor):
            tensors = True
            data = x.data
            arrays.append(data)
            nodes.append(x.node)
            dtype = data.dtype
            if dtype is not float_type:
                if dtype.kind != "f":
                    loose = True
                elif float_type is None or dtype.itemsize > float_type.itemsize:
                    float_type = dtype
        else:
            arrays.append(x)
            nodes.append(None)
            if x is not None and type(x) not in _PYTHON_NUMBERS:
                loose = True
    if not tensors:
        return _plain(arrays, weak), None
    if loose:
        _constants(inputs, arrays, float_type, weak)
    return arrays, nodes


def _constants(inputs, arrays, float_type, weak):
    """Bring constants in ``arrays`` to the Tensors' float type, and integers too where they are numbers."""
    for i, x in enumerate(arrays):
        given = inputs[i] is x
        if given and (isinstance(x, (list, np.generic)) or weak and isinstance(x, tuple)):
            x = arrays[i] = np.asarray(x)
        if float_type is not None and isinstance(x, _ndarray) and x.dtype is not float_type:
            if given and x.dtype.kind == "f" or weak and x.dtype.kind in "iu":
                arrays[i] = x.astype(float_type, copy=False)


def _plain(arrays, weak):
    """Inputs of a call without Tensors: lists become arrays, and integer arrays do not widen floats."""
    arrays = [np.asarray(x) if isinstance(x, list) else x for x in arrays]
    if arrays and type(arrays[0]) in _PYTHON_NUMBERS and not any(isinstance(x, _ndarray) for x in arrays):
        arrays[0] = np.asarray(arrays[0])
    floats = [x.dtype for x in arrays if isinstance(x, _ndarray) and x.dtype.kind == "f"]
    if weak and floats:
        widest = max(floats, key=lambda dtype: dtype.itemsize)
        numbers = (_ndarray, np.generic)
        arrays = [x.astype(widest) if isinstance(x, numbers) and x.dtype.kind in "iu" else x for x in arrays]
    return arrays


def _by_position(places, inputs, attributes):
    """Move Tensors given by keyword to their positions, with the defaults of what stands between."""
    attributes, inputs = dict(attributes), list(inputs)
    last = max((i for i, p in enumerate(places) if isinstance(attributes.get(p.name), Tensor)), default=-1)
    for place in places[len(inputs) : last + 1]:
        inputs.append(attributes.pop(place.name, place.default))
    return inputs, attributes


def _one_output(record, places):
    weak = record.weak

    def call(*inputs, **attributes):
        if attributes:
            for value in attributes.values():
                if isinstance(value, Tensor):
                    inputs, attributes = _by_position(places, inputs, attributes)
                    break
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):  # nothing to bring to one type
            arrays, nodes = (inputs[0].data,), (inputs[0].node,)
        else:
            arrays, nodes = _arrays(inputs, weak)
        data, saved = record.forward(*arrays, **attributes)
        if nodes is None:
            return data
        if type(data) is not _ndarray:
            data = np.asarray(data)
        result = _new(Tensor)
        result.data = data
        result.node = None
        for node in nodes:
            if node is not None:
                if recording():
                    result.node = node = _new(Node)
                    node.primitive = record
                    node.parents = nodes
                    node.saved = saved
                    node.shape = data.shape
                    node.dtype = data.dtype
                    node.number = next_number()
                    node.hooks = None
                break
        return result

    return call


def _several_outputs(record, places):
    weak = record.weak

    def call(*inputs, **attributes):
        if any(isinstance(value, Tensor) for value in attributes.values()):
            inputs, attributes = _by_position(places, inputs, attributes)
        arrays, nodes = _arrays(inputs, weak)
        outputs, saved = record.forward(*arrays, **attributes)
        if nodes is None:
            return outputs
        results = tuple(Tensor(data) for data in outputs)
        if any(node is not None for node in nodes) and recording():
            node = _new(Node)
            node.primitive, node.parents, node.saved = record, nodes, saved
            node.shape = node.dtype = node.hooks = None  # its outputs have them
            node.number = next_number()
            for index, result in enumerate(results):
                result.node = Output(node, index, len(results), result.data)
        return results

    return call


# ---------------------------------------------------------------------- the short way for one or two inputs
# Most small ops go this way.  The node is filled in place, here as above: a call to do it would cost
# a tenth of the whole op.
def of_one(record, general):
    """``general`` for ops of one input without attributes."""

    def call(x):
        if type(x) is _ndarray:
            return record.forward(x)[0]
        if not isinstance(x, Tensor):
            return general(x)
        data, saved = record.forward(x.data)
        if type(data) is not _ndarray:
            data = np.asarray(data)
        result = _new(Tensor)
        result.data = data
        parent = x.node
        if parent is None or not recording():
            result.node = None
            return result
        result.node = node = _new(Node)
        node.primitive = record
        node.parents = (parent,)
        node.saved = saved
        node.shape = data.shape
        node.dtype = data.dtype
        node.number = next_number()
        node.hooks = None
        return result

    return call


def _of_two(record, general):
    """``general`` for ops of two numbers without attributes: Tensors of one type, or one and a number."""

    def call(a, b):
        if isinstance(a, Tensor):
            x, left = a.data, a.node
            if isinstance(b, Tensor):
                y, right = b.data, b.node
                if x.dtype is not y.dtype:
                    return general(a, b)
            elif type(b) is float or type(b) is int:
                y, right = b, None
            else:
                return general(a, b)
        elif isinstance(b, Tensor) and (type(a) is float or type(a) is int):
            x, left, y, right = a, None, b.data, b.node
        else:
            return general(a, b)
        data, saved = record.forward(x, y)
        if type(data) is not _ndarray:
            data = np.asarray(data)
        result = _new(Tensor)
        result.data = data
        if left is None and right is None or not recording():
            result.node = None
            return result
        result.node = node = _new(Node)
        node.primitive = record
        node.parents = (left, right)
        node.saved = saved
        node.shape = data.shape
        node.dtype = data.dtype
        node.number = next_number()
        node.hooks = None
        return result

    return call
