"""The tape: nodes, the backward walk, and the switches around it.

A node refers to the nodes of its inputs, never to Tensors, so an array lives only while the user
or some vjp holds it.  Nodes carry a creation number; sorting the reachable ones by it gives a valid
order without recursion.  What a node saved is dropped as soon as its vjp has run.
"""

import functools
import itertools
from contextvars import ContextVar

import numpy as np

from xuracore.errors import DTypeError, GradError, ShapeError

next_number = itertools.count().__next__
_recording = ContextVar("xuracore_recording", default=True)
is_grad_enabled = _recording.get


class Leaf:
    """The end of the tape: where a gradient is kept."""

    __slots__ = ("grad", "owned", "shape", "dtype", "number")
    parents = ()

    def __init__(self, data):
        self.grad = None
        self.owned = False  # whether .grad may be added to in place
        self.shape, self.dtype = data.shape, data.dtype
        self.number = next_number()

    def accumulate(self, gradient):
        if self.grad is None:
            self.grad = gradient
        elif self.owned:
            self.grad += gradient
        else:
            self.grad = self.grad + gradient
            self.owned = True


class Node:
    """One recorded op: its primitive, the nodes of its inputs, what its vjp needs."""

    __slots__ = ("primitive", "parents", "saved", "shape", "dtype", "number")

    def __init__(self, primitive, parents, saved, shape, dtype):
        self.primitive, self.parents, self.saved = primitive, parents, saved
        self.shape, self.dtype = shape, dtype
        self.number = next_number()


class Output:
    """One of several outputs of a node; its gradient is handed on to the node."""

    __slots__ = ("parents", "index", "shape", "dtype", "number")

    def __init__(self, node, index, data):
        self.parents, self.index = (node,), index
        self.shape, self.dtype = data.shape, data.dtype
        self.number = next_number()


class no_grad:
    """Context manager and decorator: inside, nothing is recorded and nothing is saved."""

    _value = False

    def __enter__(self):
        self._token = _recording.set(self._value)
        return self

    def __exit__(self, *_):
        _recording.reset(self._token)

    def __call__(self, function):
        @functools.wraps(function)
        def wrapped(*arguments, **keywords):
            with type(self)():
                return function(*arguments, **keywords)

        return wrapped


class enable_grad(no_grad):
    """Record again inside a ``no_grad`` block."""

    _value = True


def unbroadcast(gradient, shape):
    """Sum ``gradient`` over the axes along which an input of ``shape`` was broadcast."""
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and gradient.shape[i + extra] != 1
    )
    return gradient.sum(axis=axes, keepdims=True).reshape(shape) if axes else gradient.reshape(shape)


def walk(root, seed, targets=None):
    """Run the vjps from ``root`` back, newest node first.

    targets : None to accumulate into every leaf; else a set of nodes whose gradients are returned
        as a dict, leaving every ``.grad`` untouched.
    """
    order, seen, stack = [], {root}, [root]
    while stack:
        node = stack.pop()
        order.append(node)
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    order.sort(key=_number, reverse=True)

    gradients, owned, found = {root: seed}, set(), {}
    for node in order:
        gradient = gradients.pop(node, None)
        if gradient is None:
            continue
        if targets is not None and node in targets:
            found[node] = gradient
        kind = type(node)
        if kind is Leaf:
            if targets is None:
                node.accumulate(gradient)
            continue
        if kind is Output:
            source = node.parents[0]
            slots = gradients.get(source)
            if slots is None:
                slots = gradients[source] = [None] * source.primitive.outputs
            slots[node.index] = gradient
            continue
        primitive, parents, saved = node.primitive, node.parents, node.saved
        if saved is None:
            raise GradError(
                f"the graph through '{primitive.name}' was already used by an earlier backward(), which "
                "frees it; run the forward pass again"
            )
        node.saved = None
        contributions = primitive.vjp(gradient, saved, [parent is not None for parent in parents])
        del saved, gradient
        for parent, contribution in zip(parents, contributions):
            if parent is None or contribution is None:
                continue
            if contribution.shape != parent.shape:
                contribution = unbroadcast(contribution, parent.shape)
            if contribution.dtype != parent.dtype:
                contribution = contribution.astype(parent.dtype)
            known = gradients.get(parent)
            if known is None:  # borrowed: the vjp may have handed out one array twice
                gradients[parent] = contribution
            elif parent in owned:
                known += contribution
            else:
                gradients[parent] = known + contribution
                owned.add(parent)
    return found


def _number(node):
    return node.number


def _seed(output, grad):
    if output.node is None:
        raise GradError("nothing was recorded for this tensor: no input requires gradients, or no_grad was on")
    if grad is None:
        if output.data.size != 1:
            raise GradError(
                f"backward() of a tensor of shape {output.shape} needs a cotangent of that shape; "
                "only a single number has an obvious one"
            )
        return np.ones_like(output.data)
    grad = np.asarray(getattr(grad, "data", grad), dtype=output.dtype)
    if grad.shape != output.shape:
        raise ShapeError(f"the cotangent has shape {grad.shape}; the tensor has {output.shape}")
    return grad


def backward(output, grad=None):
    """See :meth:`xuracore.tensor.Tensor.backward`."""
    walk(output.node, _seed(output, grad))


def gradients(output, inputs, grad=None):
    """Derivatives of ``output`` with respect to each tensor of ``inputs``, as arrays.

    Leaves' ``.grad`` stays untouched.  An input that has no influence gets zeros.
    """
    for given in inputs:
        if given.node is None:
            raise GradError("an input does not require gradients")
    found = walk(output.node, _seed(output, grad), {given.node for given in inputs})
    return [found.get(given.node, np.zeros(0)) if given.node in found else np.zeros_like(given.data)
            for given in inputs]


def value_and_grad(function, argnums=0):
    """``function(*tensors)`` → a function returning ``(value, gradient)``.

    argnums : one position, or a tuple of them (then a tuple of gradients).  The function must return
        one Tensor of one element.  Arguments may be arrays; arrays come back.
    """
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(function)
    def wrapped(*arguments, **keywords):
        from xuracore.tensor import Tensor

        arguments = list(arguments)
        for i in positions:
            data = np.asarray(getattr(arguments[i], "data", arguments[i]))
            if data.dtype.kind != "f":
                raise DTypeError(f"argument {i} is {data.dtype}; only floating-point arguments have gradients")
            arguments[i] = Tensor(data, requires_grad=True)
        with enable_grad():
            value = function(*arguments, **keywords)
        if value.node is None:
            found = [np.zeros_like(arguments[i].data) for i in positions]
        else:
            found = gradients(value, [arguments[i] for i in positions])
        return value.data, found[0] if isinstance(argnums, int) else tuple(found)

    return wrapped


def grad(function, argnums=0, create_graph=False):
    """Like :func:`value_and_grad`, returning only the gradient.

    Second derivatives are not a feature of the tape: ``create_graph=True`` raises GradError.
    """
    if create_graph:
        raise GradError(
            "create_graph is not supported: vjps are not recorded. Use xuracore.gradcheck.hvp (central "
            "differences) for diagnosis, or write the inner gradient as ordinary ops"
        )
    both = value_and_grad(function, argnums)

    @functools.wraps(function)
    def wrapped(*arguments, **keywords):
        return both(*arguments, **keywords)[1]

    return wrapped


class _Recompute:
    """The primitive behind :func:`checkpoint`: its vjp runs the function again, recorded."""

    name = "checkpoint"

    def __init__(self, outputs):
        self.outputs = outputs

    @staticmethod
    def vjp(grad, saved, needs):
        from xuracore.tensor import Tensor

        function, inputs = saved
        fresh = [Tensor(x.data, requires_grad=x.node is not None) if isinstance(x, Tensor) else x for x in inputs]
        with enable_grad():
            results = function(*fresh)
        pairs = zip(results, grad) if isinstance(results, tuple) else ((results, grad),)
        for result, cotangent in pairs:
            if cotangent is not None and result.node is not None:
                walk(result.node, cotangent)
        return [x.grad if isinstance(x, Tensor) and x.node is not None else None for x in fresh] + [None]


def checkpoint(function, *inputs):
    """Call ``function`` without keeping its intermediates; the backward pass computes them again.

    inputs : Tensors (or constants).  The function must be deterministic and return one Tensor or a
        tuple of independent Tensors.  Parameters it closes over receive their gradients as usual.
    """
    from xuracore.tensor import Tensor

    if not is_grad_enabled():
        return function(*inputs)
    with no_grad():
        results = function(*inputs)
    several = isinstance(results, tuple)
    parents = [x.node if isinstance(x, Tensor) else None for x in inputs]
    # parameters inside the function are unknown here, so the node is recorded in any case
    trunk = Leaf(np.zeros(()))
    first = results[0] if several else results
    node = Node(_Recompute(len(results) if several else 1), (*parents, trunk), (function, inputs),
                first.shape, first.dtype)
    outputs = []
    for index, result in enumerate(results if several else (results,)):
        output = Tensor(result.data)
        output.node = Output(node, index, result.data) if several else node
        outputs.append(output)
    return tuple(outputs) if several else outputs[0]
