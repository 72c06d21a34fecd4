"""The tape: nodes, the backward walk, and the switches around it.

A node refers to the nodes of its inputs, never to Tensors, so an array lives only while the user
or some vjp holds it.  Nodes are numbered downward as they are created; a heap of those that wait for
their vjp then gives a valid order without recursion: the newest first, so that every user of a result
comes before its maker.  What a node saved is dropped as soon as its vjp has run.

Changes in place take numbers from the same row (:mod:`xuracore.versions`): a node whose number is above
that of the latest change is older than it, and only then what it saved has to be looked at.
"""

import functools
import inspect
from contextvars import ContextVar
from heapq import heappop, heappush, heappushpop

import numpy as np

from xuracore import versions
from xuracore.errors import DTypeError, GradError, ShapeError
from xuracore.versions import next_number

_recording = ContextVar("xuracore_recording", default=True)
recording = _recording.get  # for the ops: a call less than is_grad_enabled
_USED = object()  # stands for what a node saved, once its vjp has run
_ALREADY_USED = (
    "was already used by an earlier backward(), which frees it; run the forward pass again, "
    "or keep it with backward(retain_graph=True)"
)
_NO_SECOND_DERIVATIVES = (
    "create_graph is not supported: vjps are not recorded. Use xuracore.gradcheck.hvp (central differences) "
    "for diagnosis, or write the inner gradient as ordinary ops"
)


def is_grad_enabled():
    """Whether ops on Tensors are being recorded in this thread or task."""
    return recording()


class Leaf:
    """The end of the tape: where a gradient is kept."""

    __slots__ = ("grad", "owned", "shape", "dtype", "number", "hooks")

    def __init__(self, data):
        self.grad = self.hooks = None
        self.owned = False  # whether .grad may be added to in place
        self.shape, self.dtype = data.shape, data.dtype
        self.number = next_number()

    def accumulate(self, gradient):
        """Add to ``.grad``.  The first gradient is borrowed: another leaf may have got the same array."""
        if self.grad is None:
            self.grad = np.asarray(gradient)
        elif self.owned:
            self.grad += gradient
        else:
            self.grad = np.asarray(self.grad + gradient)
            self.owned = True


class Node:
    """One recorded op: its primitive, the nodes of its inputs, what its vjp needs, functions of its gradient.

    Filled in by the call of the op, see :mod:`xuracore.ops.registry`.
    """

    __slots__ = ("primitive", "parents", "saved", "shape", "dtype", "number", "hooks")


class Output:
    """One of ``count`` outputs of a node; its gradient is handed on to the node, in a list of all of them."""

    __slots__ = ("source", "index", "count", "shape", "dtype", "number", "hooks")

    def __init__(self, source, index, count, data):
        self.hooks = None
        self.source, self.index, self.count = source, index, count
        self.shape, self.dtype = data.shape, data.dtype
        self.number = next_number()


class no_grad:
    """Context manager and decorator: inside, nothing is recorded and nothing is saved."""

    _value = False

    def __init__(self):
        self._tokens = []  # of each ``with`` that is open: one object may be entered again inside itself

    def __enter__(self):
        self._tokens.append(_recording.set(self._value))
        return self

    def __exit__(self, *_):
        _recording.reset(self._tokens.pop())

    def __call__(self, function):
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise GradError(
                f"{type(self).__name__} cannot decorate {function.__name__}: its body runs after the call; "
                f"write `with {type(self).__name__}():` inside it"
            )

        @functools.wraps(function)
        def wrapped(*arguments, **keywords):
            with type(self)():
                return function(*arguments, **keywords)

        return wrapped


class enable_grad(no_grad):
    """Record again inside a ``no_grad`` block."""

    _value = True


def unbroadcast(gradient, shape):
    """Sum ``gradient`` over the axes along which an input of ``shape`` was broadcast.

    Raises ShapeError where no broadcasting leads from ``shape`` to the gradient's shape.
    """
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and gradient.shape[i + extra] != 1
    ) if extra >= 0 else ()
    summed = gradient.sum(axis=axes, keepdims=True) if axes else gradient
    if summed.shape[max(extra, 0) :] != shape:
        raise ShapeError(f"a gradient of shape {gradient.shape} does not belong to an input of shape {shape}")
    return summed.reshape(shape)


def walk(seeds, targets=None, retain=False):
    """Run the vjps from the seeds back, newest node first.

    seeds : (node, gradient) pairs.   targets : None to accumulate into every leaf; else a set of nodes
    whose gradients are returned as a dict, leaving every ``.grad`` untouched.   retain : keep what the
    nodes saved, for another walk.
    """
    gradients, owned, waiting, found = {}, set(), [], {}
    latest_change = versions.latest_change()

    def add(node, gradient):
        known = gradients.get(node)
        if known is None:  # borrowed: the vjp may have handed out one array twice
            gradients[node] = gradient
            heappush(waiting, (node.number, node))
        elif node in owned:
            known += gradient
            gradients[node] = known  # a NumPy number is not changed in place by +=
        else:
            gradients[node] = known + gradient
            owned.add(node)

    for node, seed in seeds:
        add(node, seed)
    newest = None  # what the last vjp reached: mostly the next node, so it need not go through the heap
    while waiting or newest:
        number, node = heappop(waiting) if newest is None else heappushpop(waiting, newest)
        newest = None
        gradient = gradients.pop(node)
        if node.hooks is not None:
            gradient = run_hooks(node, gradient)
        if targets is not None and node in targets:
            found[node] = gradient
        kind = type(node)
        if kind is Node:
            parents, saved, primitive = node.parents, node.saved, node.primitive
            if saved is _USED:
                raise GradError(f"the graph through {primitive.name!r} {_ALREADY_USED}")
            if number > latest_change:
                versions.check(primitive.name, saved, number)
            if not retain:
                node.saved = _USED
            for parent, contribution in zip(parents, primitive.vjp(gradient, saved, parents)):
                if parent is not None and contribution is not None:
                    if contribution.shape != parent.shape:
                        contribution = _fitted(node, contribution, parent)
                    if contribution.dtype is not parent.dtype:
                        contribution = contribution.astype(parent.dtype)
                    known = gradients.get(parent)  # ``add`` again: calling it would cost a tenth
                    if known is None:
                        gradients[parent] = contribution
                        if newest is not None:
                            heappush(waiting, newest)
                        newest = parent.number, parent
                    elif parent in owned:
                        known += contribution
                        gradients[parent] = known
                    else:
                        gradients[parent] = known + contribution
                        owned.add(parent)
        elif kind is Leaf:
            if targets is None:
                node.accumulate(gradient)
        elif kind is Output:
            if node.source not in gradients:
                add(node.source, [None] * node.count)
            gradients[node.source][node.index] = gradient
        else:
            for result, cotangent in zip(node.again(retain), gradient):
                if cotangent is not None and result.node is not None:
                    add(result.node, cotangent)
    return found


def run_hooks(node, gradient):
    """``gradient`` after the functions that :meth:`xuracore.tensor.Tensor.register_hook` put on this node."""
    for hook in list(node.hooks.values()):
        replaced = hook(np.asarray(gradient))
        if replaced is not None:
            replaced = np.asarray(_data(replaced), dtype=node.dtype)
            if replaced.shape != node.shape:
                raise ShapeError(
                    f"the hook {getattr(hook, '__qualname__', hook)} returned a gradient of shape "
                    f"{replaced.shape}; the tensor has {node.shape}"
                )
            gradient = replaced
    return gradient


def _fitted(node, contribution, parent):
    try:
        return unbroadcast(contribution, parent.shape)
    except ShapeError as error:
        raise GradError(f"the vjp of {node.primitive.name!r} is wrong: {error}") from None


def _seed(output, grad):
    if output.node is None:
        raise GradError("nothing was recorded: no input of this tensor requires gradients, or no_grad was on")
    if grad is None:
        if output.data.size != 1:
            raise GradError(
                f"backward() of a tensor of shape {output.shape} needs a cotangent of that shape; "
                "only a single number has an obvious one"
            )
        return output.node, np.ones_like(output.data)
    grad = np.asarray(_data(grad), dtype=output.dtype)
    if grad.shape != output.shape:
        raise ShapeError(f"the cotangent has shape {grad.shape}; the tensor has {output.shape}")
    return output.node, grad


def _data(x):
    """The array of a Tensor; anything else as it is (the ``data`` of an ndarray is its raw memory)."""
    return x if isinstance(x, np.ndarray) else getattr(x, "data", x)


def backward(output, grad=None, retain_graph=False, create_graph=False):
    """See :meth:`xuracore.tensor.Tensor.backward`."""
    if create_graph:
        raise GradError(_NO_SECOND_DERIVATIVES)
    walk([_seed(output, grad)], retain=retain_graph)


def gradients(output, inputs, grad=None):
    """Derivatives of ``output`` with respect to each tensor of ``inputs``, as arrays.

    Leaves' ``.grad`` stays untouched.  An input that has no influence gets zeros.
    """
    for given in inputs:
        if given.node is None:
            raise GradError("an input does not require gradients")
    found = walk([_seed(output, grad)], {given.node for given in inputs})
    return [
        np.asarray(found[x.node]) if x.node in found else np.zeros_like(x.data) for x in inputs
    ]


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
            if not -len(arguments) <= i < len(arguments):
                raise GradError(f"there is no argument {i}: {len(arguments)} were given by position")
            given = Tensor(arguments[i])
            if given.dtype.kind != "f":
                raise DTypeError(f"argument {i} is {given.dtype}; only floating-point ones have gradients")
            arguments[i] = given.requires_grad_()
        with enable_grad():
            value = function(*arguments, **keywords)
        if not isinstance(value, Tensor):
            raise GradError(f"the function returned {type(value).__name__}; expected a Tensor of one element")
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
        raise GradError(_NO_SECOND_DERIVATIVES)
    both = value_and_grad(function, argnums)

    @functools.wraps(function)
    def wrapped(*arguments, **keywords):
        return both(*arguments, **keywords)[1]

    return wrapped
