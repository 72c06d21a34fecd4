"""Trade time for memory: ``checkpoint`` keeps the inputs of a call and computes the rest a second time."""

from contextvars import ContextVar

import numpy as np

from xuracore import versions
from xuracore.autograd import _ALREADY_USED, Output, enable_grad, no_grad, recording
from xuracore.errors import GradError
from xuracore.tensor import Tensor
from xuracore.versions import next_number

_drawn = ContextVar("xuracore_generators_drawn_from", default=None)  # {generator: state before} of a checkpoint


class Recomputed:
    """A call that was not recorded: the backward walk makes it again, see :func:`checkpoint`."""

    __slots__ = ("function", "inputs", "states", "number")
    hooks = None

    def __init__(self, function, inputs, states):
        self.function, self.inputs, self.states = function, inputs, states
        self.number = next_number()

    def again(self, retain=False):
        """The results as a tuple, recorded this time, on top of the nodes the inputs already have."""
        if self.function is None:
            raise GradError(f"the graph through 'checkpoint' {_ALREADY_USED}")
        if self.number > versions.latest_change():
            versions.check("checkpoint", [x.data for x in self.inputs if isinstance(x, Tensor)], self.number)
        now = {generator: generator.bit_generator.state for generator in self.states}
        try:
            for generator, state in self.states.items():
                generator.bit_generator.state = state
            with enable_grad():
                results = self.function(*self.inputs)
        finally:
            for generator, state in now.items():
                generator.bit_generator.state = state
        if not retain:
            self.function = self.inputs = self.states = None
        return results if isinstance(results, tuple) else (results,)


def drawing_from(generator):
    """Say, before drawing from a generator, that a checkpoint around will have to draw the same again."""
    drawn = _drawn.get()
    if drawn is not None:
        drawn.setdefault(generator, generator.bit_generator.state)


def checkpoint(function, *inputs, rng=None):
    """Call ``function`` without keeping its intermediates; the backward pass computes them again.

    inputs : Tensors (or constants).   rng : a Generator, or several, that the function draws from; those of
        :class:`~xuracore.nn.Dropout` are found without it.  Before the second call they are set back, and
        after it to where they were.
    The function must give the same numbers each time; it returns a Tensor or a tuple of Tensors.  Whatever it
    closes over gets its gradients as usual: they equal, bit by bit, those without a checkpoint.
    """
    generators = (rng,) if isinstance(rng, np.random.Generator) else rng or ()
    if not recording():
        for generator in generators:
            drawing_from(generator)  # for a checkpoint around this one
        return function(*inputs)
    states = {}
    token = _drawn.set(states)
    try:
        for generator in generators:
            drawing_from(generator)
        with no_grad():
            results = function(*inputs)
    finally:
        _drawn.reset(token)
    # What the function closes over is unknown, so its results are on the tape in any case.
    node = Recomputed(function, inputs, states)
    several = results if isinstance(results, tuple) else (results,)
    outputs = []
    for index, result in enumerate(several):
        if isinstance(result, Tensor) and result.dtype.kind == "f":
            data, result = result.data, result.detach()
            result.node = Output(node, index, len(several), data)
        outputs.append(result)
    return tuple(outputs) if isinstance(results, tuple) else outputs[0]
