"""Check a gradient against central differences, in float64.

The outputs are weighed with one random u.  Small inputs: each element of Jᵀ u.  Large ones: uᵀ J v for
random directions v, from two forward calls, against ⟨Jᵀ u, v⟩ from one backward.
"""

import numpy as np

from xuracore.autograd import gradients
from xuracore.errors import DTypeError, GradError
from xuracore.tensor import Tensor


def gradcheck(function, inputs, *, step=1e-6, rtol=1e-5, atol=1e-6, rng=None, directions=4, limit=200):
    """True if the recorded gradient of ``function`` at ``inputs`` matches central differences.

    function : takes Tensors, returns a Tensor or a tuple of Tensors.
    inputs : sequence of arrays or Tensors; every float64 one is checked, others are constants.
    step : half the distance of the difference.   rtol, atol : allowed difference, relative to the larger of
        the two gradients, and in any case (central differences round off at 1e-10 times the output).
    limit : inputs with more elements in all are checked along ``directions`` random directions instead
        of element by element.
    Raises GradError with the first mismatch, DTypeError if no input is float64.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    arrays = [np.array(x.data if isinstance(x, Tensor) else x) if x is not None else None for x in inputs]
    checked = [i for i, x in enumerate(arrays) if x is not None and x.dtype == np.float64]
    if not checked:
        raise DTypeError("gradcheck needs a float64 input: differences of float32 are mostly rounding")

    def run(values, record=False):
        given = [Tensor(x, record) if i in checked else x for i, x in enumerate(values)]
        result = function(*given)
        return given, result if isinstance(result, tuple) else (result,)

    given, outputs = run(arrays, record=True)
    cotangents = [rng.standard_normal(y.shape) for y in outputs]

    def weighted(values):
        return sum(float((y.data * u).sum()) for y, u in zip(run(values)[1], cotangents))

    total = None
    for y, u in zip(outputs, cotangents):
        if y.node is not None:
            part = (y * u).sum()
            total = part if total is None else total + part
    if total is None:
        raise GradError("nothing was recorded: the outputs do not depend on the inputs through ops")
    found = gradients(total, [given[i] for i in checked])

    if sum(arrays[i].size for i in checked) <= limit:
        for i, gradient in zip(checked, found):
            for index in np.ndindex(arrays[i].shape):
                expected = _difference(weighted, arrays, i, _unit(arrays[i], index), step)
                _compare(gradient[index], expected, rtol, atol, f"input {i}, element {index}")
    else:
        for n in range(directions):
            for i, gradient in zip(checked, found):
                v = rng.standard_normal(arrays[i].shape)
                expected = _difference(weighted, arrays, i, v, step)
                _compare(float((gradient * v).sum()), expected, rtol, atol, f"input {i}, direction {n}")
    return True


def _unit(array, index):
    v = np.zeros_like(array)
    v[index] = 1
    return v


def _difference(weighted, arrays, i, v, step):
    above, below = list(arrays), list(arrays)
    above[i], below[i] = arrays[i] + step * v, arrays[i] - step * v
    return (weighted(above) - weighted(below)) / (2 * step)


def _compare(given, expected, rtol, atol, where):
    if not abs(given - expected) <= atol + rtol * max(abs(given), abs(expected)):
        raise GradError(f"gradient at {where}: vjp gives {given:.12g}, central differences {expected:.12g}")


def hvp(function, x, v, step=1e-5):
    """Hessian-vector product of a scalar function by central differences of its gradient (diagnosis).

    x, v : float64 arrays of one shape.  Error O(step²).
    """
    from xuracore.autograd import grad

    slope = grad(function)
    x, v = np.asarray(x, np.float64), np.asarray(v, np.float64)
    return (slope(x + step * v) - slope(x - step * v)) / (2 * step)
