"""Every op with a namesake in torch: values and gradients of both, in float64, on drawn inputs and at kinks.

    PYTHON_WITH_TORCH tests/benchmarks/ops_against_torch.py [--seeds 3] [--only conv]

Inputs are the registry's samples, drawn anew for each seed, and the edges below.  Exit code 1 if anything differs by
more than 1e-9 of the largest number.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("XURA_KERNELS", "numpy")

import numpy as np  # noqa: E402

from xuracore import ops  # noqa: E402
from xuracore.ops.registry import REGISTRY  # noqa: E402
from xuracore.tensor import Tensor  # noqa: E402

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("torch is not installed for this interpreter; run the script with one that has it")

def all_axes(x, axis):
    return tuple(range(x.ndim)) if axis is None else axis


def prod(x, axis=None, keepdims=False):
    """torch multiplies along one axis at a time."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    for a in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, a, keepdim=keepdims)
    return x


def key_of(key):
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(torch.as_tensor(p) if isinstance(p, (np.ndarray, list)) else p for p in parts)


def pad(x, widths, value=0.0, mode="constant"):
    return F.pad(x, [n for pair in reversed(widths) for n in pair], value=value) if mode == "constant" else None


def several(x, counts, axis=-1):
    counts = torch.as_tensor(counts) if isinstance(counts, tuple) else counts
    return torch.repeat_interleave(x, counts, axis)


def positive(x, index, axis):
    return torch.where(index < 0, index + x.shape[axis], index)


def rows(index, x):
    return torch.where(index < 0, index + len(x), index)


def channels_last(loss, x, target, **settings):
    """torch has the classes on axis 1."""
    return loss(x.movedim(-1, 1) if x.ndim > 1 else x, target.long(), **settings)


def weighted(weight):
    return None if weight is None else torch.tensor(weight, dtype=torch.float64)


def vector_norm(x, axis=None, keepdims=False, order=2.0):
    return torch.linalg.vector_norm(x, order, all_axes(x, axis) or None, keepdims)


def reduction(function):
    def call(x, axis=None, keepdims=False):
        axes = all_axes(x, axis)
        return function(x, axes, keepdims) if axes != () else x * 1

    return call


def spread(function):
    def call(x, axis=None, keepdims=False, correction=0):
        return function(x, all_axes(x, axis), correction=correction, keepdim=keepdims)

    return call


def attention(q, k, v, mask=None, causal=False, scale=None):
    """Masks of two kinds become one that is added; torch gives NaN where a row may see nothing, so not then."""
    added = torch.zeros(q.shape[2], k.shape[2])
    if causal:
        added = added.masked_fill(~torch.ones_like(added).bool().tril(k.shape[2] - q.shape[2]), -torch.inf)
    if mask is not None:
        mask = torch.as_tensor(mask)
        added = added + mask if mask.is_floating_point() else added.masked_fill(~mask, -torch.inf)
    if bool((added == -torch.inf).all(-1).any()):
        return None
    added = added.broadcast_to(*q.shape[:2], *added.shape[-2:])
    return F.scaled_dot_product_attention(q, k, v, added, scale=scale, enable_gqa=True)


def conv(function):
    def call(x, weight, bias=None, **settings):
        return function(x, weight, bias, **settings) if x.numel() else None

    return call


def interpolate(x, size, mode="nearest", align_corners=False, antialias=False):
    corners = None if mode.startswith("nearest") else align_corners
    return F.interpolate(x, size, mode=mode, align_corners=corners, antialias=antialias)


def windows(x, size, step=1, axis=-1):
    return x.unfold(axis, size, step)


def group(x, weight=None, bias=None, groups=1, eps=1e-5):
    return F.group_norm(x, groups, weight, bias, eps) if x.numel() else None


def causal_conv1d(x, weight, bias=None, state=None, silu=False):
    if state is None:
        state = torch.zeros(len(x), weight.shape[-1] - 1, x.shape[2], dtype=x.dtype)
    past = torch.cat([state, x], 1)
    y = F.conv1d(past.mT, weight.reshape(len(weight), 1, -1), bias, groups=len(weight)).mT
    return (F.silu(y) if silu else y), past[:, x.shape[1]:]


UNARY = {name: getattr(torch, name) for name in (
    "reciprocal square rsqrt exp2 log2 log10 tan asin acos atan sinh cosh asinh acosh atanh sign floor ceil round "
    "trunc negative absolute exp expm1 log log1p sqrt sin cos sigmoid tanh erf relu"
).split()}  # fmt: skip
BINARY = {name: getattr(torch, name) for name in
          "add subtract multiply divide maximum minimum atan2 logaddexp lerp where matmul".split()}
NAMESAKES = UNARY | BINARY | {
    "silu": F.silu, "softplus": F.softplus, "gelu": F.gelu, "log_sigmoid": F.logsigmoid, "softsign": F.softsign,
    "mish": F.mish, "hardswish": F.hardswish, "leaky_relu": lambda x, slope=0.01: F.leaky_relu(x, slope),
    "elu": lambda x, alpha=1.0: F.elu(x, alpha), "power": torch.pow,
    "remainder": lambda a, b: torch.remainder(a, b) if b.ndim else None,  # of a 0-d b, torch gives no gradient
    "clip": lambda x, low=None, high=None: torch.clamp(x, low, high),
    "nan_to_num": torch.nan_to_num,
    "cumsum": lambda x, axis=-1: torch.cumsum(x, axis), "cumprod": lambda x, axis=-1: torch.cumprod(x, axis),
    "logcumsumexp": lambda x, axis=-1: torch.logcumsumexp(x, axis),
    "cummax": lambda x, axis=-1: torch.cummax(x, axis)[0] if x.numel() else None,
    "cummin": lambda x, axis=-1: torch.cummin(x, axis)[0] if x.numel() else None,
    "getitem": lambda x, key: x[key_of(key)],
    "embedding": lambda table, ids: F.embedding(ids, table),
    "take_along_axis": lambda x, index, axis=-1: torch.take_along_dim(x, positive(x, index, axis), axis),
    "scatter_add": lambda x, index, source, axis=-1: x.scatter_add(axis, positive(x, index, axis), source),
    "index_add": lambda x, index, source: x.index_add(0, rows(index, x), source),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, axes=None: x.permute(axes or tuple(range(x.ndim))[::-1]),
    "concatenate": lambda *a, axis=0: torch.cat(a, axis), "stack": lambda *a, axis=0: torch.stack(a, axis),
    "split": lambda x, sizes, axis=-1: torch.split(x, sizes, axis),
    "broadcast_to": lambda x, shape: torch.broadcast_to(x, shape), "pad": pad,
    "flip": lambda x, axis: torch.flip(x, (axis,) if isinstance(axis, int) else axis),
    "linear": F.linear, "einsum": lambda *a, equation: torch.einsum(equation, *a),
    "sum": reduction(torch.sum), "mean": reduction(torch.mean), "max": reduction(torch.amax),
    "min": reduction(torch.amin), "var": spread(torch.var), "std": spread(torch.std), "prod": prod,
    "logsumexp": lambda x, axis=-1, keepdims=False: torch.logsumexp(x, all_axes(x, axis), keepdims),
    "norm": vector_norm, "attention": attention,
    "conv2d": conv(F.conv2d), "conv_transpose2d": conv(F.conv_transpose2d),
    "unfold": F.unfold, "fold": F.fold, "causal_conv1d": causal_conv1d,
    "group_norm": group, "instance_norm": lambda x, weight=None, bias=None, eps=1e-5: group(
        x, weight, bias, x.shape[1], eps),
    "batch_norm": lambda x, weight=None, bias=None, eps=1e-5: F.batch_norm(
        x, None, None, weight, bias, training=True, eps=eps),
    "cross_entropy": lambda x, t, **a: channels_last(F.cross_entropy, x, t, **a) if bool((t >= 0).any()) else None,
    "nll_loss": lambda x, t, weight=None, **a: channels_last(F.nll_loss, x, t, weight=weighted(weight), **a),
    "bce_with_logits": lambda x, t, weight=None, **a: F.binary_cross_entropy_with_logits(
        x, t, weighted(weight), **a) if x.numel() else None,
    "binary_cross_entropy": F.binary_cross_entropy,
    "kl_div": F.kl_div, "mse_loss": F.mse_loss, "l1_loss": F.l1_loss, "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "layer_norm": lambda x, weight=None, bias=None, eps=1e-5: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    "rms_norm": lambda x, weight=None, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps),
    "l2_normalize": lambda x, axis=-1, eps=1e-12: F.normalize(x, dim=axis, eps=eps),
    "softmax": lambda x, axis=-1: torch.softmax(x, axis), "log_softmax": lambda x, axis=-1: F.log_softmax(x, axis),
    "sort": lambda x, axis=-1, descending=False: torch.sort(x, dim=axis, descending=descending, stable=True)[0],
    "max_pool2d": lambda x, **a: F.max_pool2d(x, **a) if x.numel() else None,
    "avg_pool2d": F.avg_pool2d,
    "adaptive_avg_pool2d": lambda x, output_size: F.adaptive_avg_pool2d(x, output_size),
    "roll": lambda x, shift, axis=None: torch.roll(x, shift, axis),
    "tile": lambda x, counts: torch.tile(x, counts if isinstance(counts, tuple) else (counts,)),
    "repeat": several, "tril": lambda x, offset=0: torch.tril(x, offset),
    "triu": lambda x, offset=0: torch.triu(x, offset),
    "diagonal": lambda x, offset=0, first=-2, second=-1: torch.diagonal(x, offset, first, second),
    "diag": lambda x, offset=0: torch.diag_embed(x, offset), "windows": windows, "interpolate": interpolate,
}  # fmt: skip

KINKS = np.array([-3.0, -1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 3.0])
TIES = np.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, -1.0, -1.0]])
EDGES = (
    [(name, "kinks", (KINKS,), {}) for name in
     "absolute sign relu leaky_relu elu softsign hardswish square floor ceil round trunc tanh silu".split()]
    + [(name, "ties", (TIES,), {"axis": -1}) for name in
       "max min cummax cummin sort logsumexp norm std var prod cumprod softmax".split()]
    + [(name, "ties", (TIES, TIES[::-1].copy()), {}) for name in ("maximum", "minimum", "logaddexp", "l1_loss")]
    + [("clip", "bounds", (KINKS,), {"low": -1.0, "high": 0.5}),
       ("norm", "zeros", (np.zeros((2, 3)),), {"axis": 1}), ("norm", "zeros", (np.zeros((2, 3)),), {"order": np.inf}),
       ("norm", "ties", (TIES,), {"axis": 1, "order": np.inf}), ("norm", "ties", (TIES,), {"axis": 1, "order": 1.0}),
       ("smooth_l1_loss", "kinks", (KINKS, 0 * KINKS), {}), ("huber_loss", "kinks", (KINKS, 0 * KINKS), {}),
       ("max_pool2d", "ties", (np.tile(TIES[None, None], (1, 1, 2, 2)),), {"kernel_size": 3, "stride": 1}),
       ("power", "zero base", (np.array([0.0, 0.0, 2.0]), np.array([1.0, 2.0, 0.0])), {}),
       ("binary_cross_entropy", "certain", (np.array([0.0, 1.0, 0.5]), np.array([0.0, 1.0, 1.0])), {}),
       ("kl_div", "zero target", (-np.ones((2, 2)), np.array([[0.0, 1.0], [0.5, 0.5]])), {"reduction": "sum"}),
       ("interpolate", "one pixel", (np.ones((1, 1, 1, 1)),), {"size": (3, 2), "mode": "bicubic"})]
)  # fmt: skip


def differentiable(x):
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def run(function, inputs, attributes, leaf, cotangents):
    """Outputs and gradients, as arrays, of one side; None if it has no such case."""
    given = [leaf(x) if differentiable(x) else x for x in inputs]
    outputs = function(*given, **attributes)
    if outputs is None:
        return None
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    total = None
    for y in outputs:
        u = cotangents(tuple(y.shape))
        part = (y * (torch.from_numpy(u) if isinstance(y, torch.Tensor) else u)).sum()
        total = part if total is None else total + part
    if total.requires_grad:
        total.backward()
    values = [np.asarray(y.detach().numpy() if isinstance(y, torch.Tensor) else y.data) for y in outputs]
    gradients = [x.grad if getattr(x, "grad", None) is not None else None
                 for x in given if isinstance(x, (torch.Tensor, Tensor)) and x.requires_grad]  # fmt: skip
    return values, [None if g is None else np.asarray(g) for g in gradients]


def torch_input(x):
    return torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x


def difference(ours, theirs):
    """The largest relative difference of two lists of arrays; an absent gradient is zero."""
    worst = 0.0
    for a, b in zip(ours, theirs):
        if a is None or b is None:
            a, b = (np.zeros(1) if z is None else z for z in (a, b))
        elif a.shape != b.shape:
            return np.inf
        if a.size or b.size:
            scale = max(1.0, float(np.nanmax(np.abs(b), initial=0)))
            worst = max(worst, float(np.max(np.abs(a - b), initial=0)) / scale)
    return worst if worst == worst else np.inf


def cases(name, seeds):
    for seed in range(seeds):
        for i, (inputs, attributes) in enumerate(REGISTRY[name].samples(np.random.default_rng(seed))):
            yield f"sample {i}, seed {seed}", inputs, attributes
    for edge, label, inputs, attributes in EDGES:
        if edge == name:
            yield label, inputs, attributes


def compare(name, seeds):
    """(number of cases compared, list of (case, difference of values, of gradients)) of one op."""
    function, compared, failed = getattr(ops, name), 0, []
    for label, inputs, attributes in cases(name, seeds):
        def leaf(x):
            return Tensor(np.array(x), requires_grad=True)

        def torch_leaf(x):
            return torch.from_numpy(np.array(x)).requires_grad_()

        def draws():
            rng = np.random.default_rng(1)
            return lambda shape: np.asarray(rng.standard_normal(shape))

        try:
            theirs = run(lambda *x, **a: NAMESAKES[name](*map(torch_input, x), **a), inputs, attributes, torch_leaf,
                         draws())
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
            failed.append((label, f"torch: {error}"[:100], ""))
            continue
        if theirs is None:
            continue
        ours = run(function, inputs, attributes, leaf, draws())
        compared += 1
        value, gradient = (difference(a, b) for a, b in zip(ours, theirs))
        if max(value, gradient) > 1e-9:
            failed.append((label, f"{value:.1e}", f"{gradient:.1e}"))
    return compared, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="draws of every sample")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    chosen = [name for name in NAMESAKES if options.only in name]
    total, wrong = 0, 0
    print("| op | case | values differ by | gradients differ by |\n|---|---|---|---|")
    for name in chosen:
        compared, failed = compare(name, options.seeds)
        total += compared
        wrong += len(failed)
        for row in failed:
            print("|", " | ".join((name, *row)), "|")
    without = sorted(set(REGISTRY) - set(NAMESAKES))
    print(f"\n{len(chosen)} ops, {total} cases compared in float64, {wrong} differ by more than 1e-9.")
    print(f"Without a namesake: {', '.join(without)}.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
