"""The table of all ops, written from the registry."""

import inspect

import numpy as np

from xuracore.ops.registry import REGISTRY


def op_table():
    """Every registered op as a Markdown table: name, inputs, settings, what it keeps, tolerance, summary.

    *keeps* is what the op's first sample saves for its gradient, in bytes for each byte of its inputs in
    float64: 0 where nothing but shapes is kept, 1 where as much as the inputs.  *tolerance* is the relative
    difference allowed between the float32 op and its float64 reference.
    """
    lines = ["| op | inputs | settings | keeps | tolerance | |", "|---|---|---|---|---|---|"]
    for name, record in sorted(REGISTRY.items()):
        inputs, attributes = next(iter(record.samples(np.random.default_rng(0))))
        names, settings = _parameters(record.forward, len(inputs), attributes)
        summary = (record.forward.__doc__ or record.reference.__doc__ or "").strip().splitlines()[0]
        cells = f"`{name}`", names, settings, f"{_kept(record, inputs, attributes):.1f}", f"{record.tolerance:g}"
        lines.append("| " + " | ".join((*cells, summary.replace("|", "\\|"))) + " |")
    return "\n".join(lines)


def _parameters(forward, count, attributes):
    """(inputs, settings with defaults) of an op, from the signature of its forward."""
    inputs, settings = [], []
    for i, (name, p) in enumerate(inspect.signature(forward).parameters.items()):
        if p.kind is p.VAR_POSITIONAL:
            inputs.append(f"*{name}")
        elif p.kind is not p.VAR_KEYWORD:
            given = i < count and name not in attributes and p.kind is p.POSITIONAL_OR_KEYWORD
            text = name if p.default is p.empty else f"{name}={p.default!r}"
            (inputs if given else settings).append(text)
    return ", ".join(inputs), ", ".join(settings)


def _kept(record, inputs, attributes):
    saved, seen = record.forward(*inputs, **attributes)[1], {}
    _collect(saved, seen)
    total = sum(x.nbytes for x in inputs if isinstance(x, np.ndarray))
    return sum(seen.values()) / max(total, 1)


def _collect(saved, seen):
    """Bytes of each different array in nested tuples, lists and dicts."""
    if isinstance(saved, np.ndarray):
        seen[id(saved)] = saved.nbytes
    elif isinstance(saved, (tuple, list, dict)):
        for item in saved.values() if isinstance(saved, dict) else saved:
            _collect(item, seen)
