"""Find the op that made a gradient infinite or NaN, and the line that called it."""

import linecache
import os
import sys
from contextvars import ContextVar

import numpy as np

from xuracore.errors import GradError
from xuracore.ops.registry import close_instrument, note, open_instrument

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_watching = ContextVar("xuracore_detect_anomaly", default=())  # the blocks that are open in this context


class detect_anomaly:
    """``with detect_anomaly():`` raise GradError at the first gradient that is not finite.

    The message names the op, its input, and the line of the program that called the op; so both the forward
    and the backward pass belong inside.  Works for :class:`~xuracore.Function` as well.  Holds for the
    thread or task that entered it.

    outputs : look at the result of every op too, as soon as it is there.
    """

    def __init__(self, outputs=False):
        self.outputs = outputs
        self._tokens = []

    def __enter__(self):
        self._tokens.append(_watching.set((*_watching.get(), self)))
        open_instrument(_watch)
        return self

    def __exit__(self, *_):
        close_instrument(_watch)
        _watching.reset(self._tokens.pop())


def _watch(record, forward, vjp):
    def watched_forward(*arrays, **attributes):
        output, saved = forward(*arrays, **attributes)
        blocks = _watching.get()
        if blocks:
            site = call_site()
            if any(block.outputs for block in blocks):
                for part in output if record.outputs > 1 else (output,):
                    _check(part, f"the result of {record.name!r}", site)
            saved = note(saved, site=site)
        return output, saved

    def watched_vjp(grad, saved, needs):
        if not _watching.get():
            return vjp(grad, saved, needs)
        site = getattr(saved, "site", None)
        for part in grad if record.outputs > 1 else (grad,):
            _check(part, f"the gradient that reaches {record.name!r}", site)
        found = vjp(grad, saved, needs)
        for i, (part, need) in enumerate(zip(found, needs)):
            if need is not None and need is not False:
                _check(part, f"the gradient of input {i} of {record.name!r}", site)
        return found

    return watched_forward, watched_vjp


def _check(array, what, site):
    if array is None or getattr(array, "dtype", None) is None or array.dtype.kind != "f":
        return
    bad = np.size(array) - int(np.isfinite(array).sum())
    if bad:
        kind = "NaN" if np.isnan(array).any() else "infinite"
        where = f"called at {site}" if site else "called outside detect_anomaly, so its line is not known"
        raise GradError(f"{what} is not finite: {bad} of {np.size(array)} elements, {kind}; the op was {where}")


def call_site():
    """``file:line in function: code`` of the innermost call from outside the engine."""
    frame = sys._getframe(1)
    while frame.f_back and os.path.abspath(frame.f_code.co_filename).startswith(_PACKAGE):
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}" + (f": {line}" if line else "")
