"""Trees of parameters: nested dicts whose leaves are Parameters (trained) or arrays (plain numbers).

A model here is a function of its parameters, as in JAX: nothing is stored in it.  Dense kernels are (in, out),
and the initial values those of Flax: kernels normal with variance 1 / in, truncated at two standard deviations.
"""

import math

import numpy as np

from xuracore import ops
from xuracore.errors import FormatError
from xuracore.nn import Parameter, init

NORM_EPS = 1e-6
_TRUNCATED = 0.87962566103423978  # standard deviation of a standard normal cut at ± 2


def new_dense(rng, inputs, outputs, bias=True):
    """{"kernel": (inputs, outputs), "bias": (outputs)}."""
    std = 1 / math.sqrt(inputs) / _TRUNCATED
    tree = {"kernel": Parameter(init.truncated_normal((inputs, outputs), rng, std))}
    if bias:
        tree["bias"] = Parameter(init.zeros(outputs))
    return tree


def new_norm(width):
    """{"scale": (width), "bias": (width)}."""
    return {"scale": Parameter(init.ones(width)), "bias": Parameter(init.zeros(width))}


def dense(tree, x):
    """x (…, in) → (…, out)."""
    y = ops.matmul(x, tree["kernel"])
    return y + tree["bias"] if "bias" in tree else y


def norm(tree, x):
    """Layer normalisation, or nothing where the tree has none."""
    return x if tree is None else ops.layer_norm(x, tree["scale"], tree["bias"], eps=NORM_EPS)


def mlp(tree, x):
    """Dense → norm → ReLU → Dense, with the names ``in``, ``norm`` and ``out``."""
    return dense(tree["out"], ops.relu(norm(tree.get("norm"), dense(tree["in"], x))))


def new_mlp(rng, inputs, hidden, outputs, use_norm):
    """Parameters of :func:`mlp`."""
    tree = {"in": new_dense(rng, inputs, hidden), "out": new_dense(rng, hidden, outputs)}
    if use_norm:
        tree["norm"] = new_norm(hidden)
    return tree


def flatten(tree, prefix=""):
    """{"encoder/obs/in/kernel": leaf, …} in the order of the tree."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat):
    """The tree that :func:`flatten` was given."""
    tree = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def map_leaves(function, tree):
    """The tree with ``function`` applied to each leaf."""
    return {k: map_leaves(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}


def arrays(tree, dtype=None):
    """The same tree with plain arrays, copied, for inference and files."""
    return map_leaves(lambda leaf: np.array(getattr(leaf, "data", leaf), dtype=dtype, order="C"), tree)


def parameters(tree, dtype=None):
    """The same tree with new trainable Parameters."""
    return map_leaves(lambda array: Parameter(array), arrays(tree, dtype))


def count(tree):
    """How many numbers the tree holds."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def check_same_form(given, expected, path=None):
    """FormatError listing every missing, unexpected, misshapen or non-finite leaf of ``given``."""
    given, expected = flatten(given), flatten(expected)
    wrong = [f"missing {name}" for name in expected if name not in given]
    wrong += [f"unexpected {name}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        if given[name].shape != expected[name].shape:
            wrong.append(f"{name} has shape {given[name].shape}, expected {expected[name].shape}")
        elif not np.isfinite(np.asarray(given[name])).all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        raise FormatError("; ".join(sorted(wrong)[:8]) + (" …" if len(wrong) > 8 else ""), path)
