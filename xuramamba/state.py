"""What can be done with states: of one mixer (a named tuple of Tensors), or of a whole model (a tuple of those).

Every function takes either, however nested.  A state has the same size whatever the length of the
past, so keeping one before a draft and going back to it costs a copy::

    kept = snapshot(state)
    _, state = lm(draft, state)
    state = restore(kept)                     # as if the draft had never been read

``select``, ``stack`` and ``split`` are ops on the tape: gradients pass through them.
"""

import json

import numpy as np

from xuracore import io, ops
from xuracore.errors import FormatError, ShapeError
from xuracore.tensor import Tensor

FORMAT, VERSION = "xura_state", 1
MAX_DEPTH = 8  # of a file's nesting


def map_state(function, *states):
    """A state of ``function(tensor, …)`` of the corresponding tensors.  Raises ShapeError for unlike states."""
    first = states[0]
    if isinstance(first, (Tensor, np.ndarray)):
        return function(*states)
    if not isinstance(first, (tuple, list)):
        raise ShapeError(f"{type(first).__name__} in a state; expected Tensors, or tuples and lists of them")
    if any(type(other) is not type(first) or len(other) != len(first) for other in states):
        raise ShapeError("the states are of different mixers, or of different numbers of layers")
    parts = [map_state(function, *parts) for parts in zip(*states)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def leaves(state):
    """The tensors of a state, in order."""
    found = []
    map_state(lambda x: found.append(x) or x, state)
    return found


def nbytes(state):
    """Bytes that a state holds."""
    return sum(_array(x).nbytes for x in leaves(state))


def detach(state):
    """The same numbers without their history: what truncated backpropagation carries on."""
    return map_state(lambda x: Tensor(_array(x)), state)


def snapshot(state):
    """A copy that nothing changes, without history; go back to it with :func:`restore`, any number of times."""

    def copy(x):
        data = _array(x).copy()
        data.flags.writeable = False
        return Tensor(data)

    return map_state(copy, state)


def restore(kept):
    """A fresh, writable state equal to a snapshot."""
    return map_state(lambda x: Tensor(_array(x).copy()), kept)


def select(state, rows):
    """Rows of a state along the batch, in this order; a row may come several times or not at all."""
    rows = np.asarray(rows)
    if rows.dtype == bool:
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or rows.size and rows.dtype.kind not in "iu":
        raise ShapeError(f"rows have shape {rows.shape} and type {rows.dtype}; expected a list of row numbers")
    rows, count = rows.astype(np.int64), batch_size(state)
    if rows.size and not -count <= rows.min() <= rows.max() < count:
        raise ShapeError(f"rows go from {rows.min()} to {rows.max()}; the state has {count}")
    return map_state(lambda x: x[rows], state)


def fork(state, copies):
    """Each row ``copies`` times, copies of one row side by side: to continue one past in several ways."""
    if copies < 1:
        raise ShapeError(f"copies={copies}; expected at least 1")
    return select(state, np.repeat(np.arange(batch_size(state)), copies))


def stack(states):
    """One state whose batch holds the rows of all, in order."""
    states = list(states)
    if not states:
        raise ShapeError("no states were given; expected at least one")
    return map_state(lambda *parts: ops.concatenate(*parts, axis=0), *states)


def split(state, sizes=None):
    """The list of states that :func:`stack` would join: of ``sizes`` rows each, or of one."""
    count = batch_size(state)
    sizes = [1] * count if sizes is None else [int(size) for size in sizes]
    if min(sizes, default=0) < 0 or sum(sizes) != count:
        raise ShapeError(f"sizes {sizes} add up to {sum(sizes)}; the state has {count} rows")
    edges = np.cumsum([0, *sizes])
    return [map_state(lambda x, a=a, b=b: x[a:b], state) for a, b in zip(edges.tolist(), edges[1:].tolist())]


def batch_size(state):
    """Rows of a state.  Raises ShapeError if its parts disagree, or if it has none."""
    counts = {_array(x).shape[:1] for x in leaves(state)}
    if len(counts) != 1 or counts == {()}:
        raise ShapeError(f"the parts of the state have {sorted(counts)} rows; expected one number")
    return counts.pop()[0]


def save(state, path):
    """Write a state to ``path`` (safetensors), atomically, with its structure and the format's version."""
    tensors = {}
    structure = _describe(state, "state", tensors)
    metadata = {"format": FORMAT, "version": str(VERSION), "structure": json.dumps(structure)}
    io.save_safetensors(path, tensors, metadata)


def load(path, like=None):
    """The state that :func:`save` wrote.

    like : a state of the mixer or model that is to go on (its ``initial_state(batch)``): the file must
        have its structure, shapes and dtypes.  The batch may differ.
    Raises FormatError if the file is damaged, no state, of another version, or unlike ``like``.
    """
    metadata = io.read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path}: format is {metadata.get('format')!r}; expected {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        raise FormatError(f"{path}: version is {metadata.get('version')!r}; this program reads {VERSION}")
    structure = io.parse_json(metadata.get("structure", "").encode(), f"{path}: structure")
    tensors = io.load_safetensors(path)
    state = _build(structure, "state", tensors, path, _kinds(like), MAX_DEPTH)
    if tensors:
        raise FormatError(f"{path}: {sorted(tensors)} belong to no part of the state")
    if like is not None:
        wrong = _differences(state, like, "state")
        if wrong:
            raise FormatError(f"{path} does not fit: " + "; ".join(wrong))
    return state


# ---------------------------------------------------------------------- structure
def _array(x):
    return x.data if isinstance(x, Tensor) else x


def _describe(state, name, tensors):
    """JSON of the structure; fills ``tensors`` with arrays under dotted names."""
    if isinstance(state, (Tensor, np.ndarray)):
        tensors[name] = _array(state)
        return None
    if not isinstance(state, (tuple, list)):
        raise ShapeError(f"{type(state).__name__} in a state; expected Tensors, or tuples and lists of them")
    keys = getattr(state, "_fields", range(len(state)))
    parts = [_describe(part, f"{name}.{key}", tensors) for key, part in zip(keys, state)]
    return {"kind": type(state).__name__, "parts": parts}


def _kinds(like):
    """Classes by name: the states of this package's mixers, and those in ``like``."""
    from xuramamba import mamba1, mamba2, mamba3, s4, s4d

    known = [mamba1.Mamba1State, mamba2.Mamba2State, mamba3.Mamba3State, s4.S4State, s4d.S4DState]
    kinds = {kind.__name__: kind for kind in known} | {"tuple": tuple, "list": list}

    def add(state):
        if isinstance(state, (tuple, list)):
            kinds[type(state).__name__] = type(state)
            for part in state:
                add(part)

    add(like)
    return kinds


def _build(structure, name, tensors, path, kinds, depth):
    if structure is None:
        if name not in tensors:
            raise FormatError(f"{path}: tensor {name!r} is missing")
        return Tensor(tensors.pop(name))
    right = isinstance(structure, dict) and set(structure) == {"kind", "parts"} and depth > 0
    if not right or structure["kind"] not in kinds or not isinstance(structure["parts"], list):
        raise FormatError(f"{path}: {name} is described by {str(structure)[:80]!r}; expected a known kind of state")
    kind, parts = kinds[structure["kind"]], structure["parts"]
    fields = getattr(kind, "_fields", range(len(parts)))
    if len(fields) != len(parts):
        raise FormatError(f"{path}: {name} has {len(parts)} parts; {kind.__name__} has {len(fields)}")
    built = [
        _build(part, f"{name}.{key}", tensors, path, kinds, depth - 1) for key, part in zip(fields, parts)
    ]
    return kind(*built) if hasattr(kind, "_fields") else kind(built)


def _differences(state, like, name):
    """What is wrong with ``state`` where it should be as ``like``, in words."""
    if isinstance(like, (Tensor, np.ndarray)):
        if not isinstance(state, Tensor):
            return [f"{name} is a {type(state).__name__}, expected a tensor"]
        got, want = state.data, _array(like)
        if got.shape[1:] != want.shape[1:] or got.ndim != want.ndim or got.dtype != want.dtype:
            rest = ", ".join(map(str, want.shape[1:]))
            return [f"{name} is {got.dtype} {got.shape}, expected {want.dtype} (batch, {rest})"]
        return []
    if type(state) is not type(like) or len(state) != len(like):
        return [f"{name} is a {type(state).__name__}, expected a {type(like).__name__} of {len(like)}"]
    keys = getattr(like, "_fields", range(len(like)))
    return sum((_differences(s, w, f"{name}.{k}") for k, s, w in zip(keys, state, like)), [])
