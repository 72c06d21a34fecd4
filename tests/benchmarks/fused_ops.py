"""Fused ops against torch, forward and backward: norms, activations, softmax, cross-entropy, attention, AdamW.

    python tests/benchmarks/fused_ops.py --peer-python PYTHON_WITH_TORCH

Each side runs in its own process, in turns (see alternate.py): two thread pools in one process would disturb each
other.  A call is what a user writes: forward is the op with gradients recorded, backward is the gradient with
respect to every input that has one.  Both sides get float32 inputs of the same shapes.
"""

import functools
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.alternate import main  # noqa: E402

# label: (op, shapes of its inputs, settings)
CASES = {
    "layer_norm (8, 512, 768)": ("layer_norm", [(8, 512, 768), (768,), (768,)], {}),
    "layer_norm (1, 197, 1024)": ("layer_norm", [(1, 197, 1024), (1024,), (1024,)], {}),
    "layer_norm (4, 64)": ("layer_norm", [(4, 64), (64,), (64,)], {}),
    "rms_norm (8, 512, 768)": ("rms_norm", [(8, 512, 768), (768,)], {}),
    "rms_norm (1, 197, 1024)": ("rms_norm", [(1, 197, 1024), (1024,)], {}),
    "rms_norm (4, 64)": ("rms_norm", [(4, 64), (64,)], {}),
    "gelu (8, 512, 3072)": ("gelu", [(8, 512, 3072)], {"approximate": "none"}),
    "gelu (197, 4096)": ("gelu", [(197, 4096)], {"approximate": "none"}),
    "gelu (4, 64)": ("gelu", [(4, 64)], {"approximate": "none"}),
    "gelu tanh (8, 512, 3072)": ("gelu", [(8, 512, 3072)], {"approximate": "tanh"}),
    "gelu tanh (197, 4096)": ("gelu", [(197, 4096)], {"approximate": "tanh"}),
    "silu (8, 512, 3072)": ("silu", [(8, 512, 3072)], {}),
    "silu (197, 4096)": ("silu", [(197, 4096)], {}),
    "silu (4, 64)": ("silu", [(4, 64)], {}),
    "softmax (32, 32000)": ("softmax", [(32, 32000)], {}),
    "softmax (12, 512, 512)": ("softmax", [(12, 512, 512)], {}),
    "softmax (16, 64)": ("softmax", [(16, 64)], {}),
    "cross_entropy (32, 32000)": ("cross_entropy", [(32, 32000)], {}),
    "cross_entropy (512, 32000)": ("cross_entropy", [(512, 32000)], {}),
    "cross_entropy (32, 1000)": ("cross_entropy", [(32, 1000)], {}),
    "attention (1, 16, 197, 64)": ("attention", [(1, 16, 197, 64)] * 3, {"causal": False}),
    "attention (1, 12, 1024, 64)": ("attention", [(1, 12, 1024, 64)] * 3, {"causal": False}),
    "attention (1, 4, 4096, 64)": ("attention", [(1, 4, 4096, 64)] * 3, {"causal": False}),
    "attention (8, 4, 65, 24)": ("attention", [(8, 4, 65, 24)] * 3, {"causal": False}),
    "attention causal (1, 16, 197, 64)": ("attention", [(1, 16, 197, 64)] * 3, {"causal": True}),
    "attention causal (1, 12, 1024, 64)": ("attention", [(1, 12, 1024, 64)] * 3, {"causal": True}),
    "attention causal (1, 4, 4096, 64)": ("attention", [(1, 4, 4096, 64)] * 3, {"causal": True}),
    "AdamW 10 M in one": ("adamw", [(10_000_000,)], {}),
    "AdamW 29 M in 100": ("adamw", [(768, 768), (768,)] * 50, {}),
    "AdamW 10 k in 100": ("adamw", [(10, 10)] * 100, {}),
}


def inputs(op, shapes):
    """The same numbers on both sides."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


# ---------------------------------------------------------------------- ours
def prepare_ours(threads):
    import xuracore as xc

    xc.set_num_threads(threads)


def ours(op, shapes, settings):
    import numpy as np

    import xuracore as xc
    from xuracore import autograd, ops

    arrays = inputs(op, shapes)
    if op == "adamw":
        from training.optim import AdamW
        from xuracore.nn import Parameter

        parameters = [Parameter(array) for array in arrays]
        for parameter in parameters:
            parameter.grad = parameter.data * np.float32(0.1)
        return AdamW(parameters).step, None
    tensors = [xc.Tensor(array, requires_grad=True) for array in arrays]
    if op == "cross_entropy":
        target = np.arange(shapes[0][0]) * 7 % shapes[0][1]
        call = functools.partial(ops.cross_entropy, *tensors, target)
    else:
        call = functools.partial(getattr(ops, op), *tensors, **settings)
    cotangent = np.ones_like(call().data)
    return call, lambda y: autograd.gradients(y, tensors, cotangent)


# ---------------------------------------------------------------------- torch
def prepare_torch(threads):
    try:
        import torch
    except ImportError:
        raise SystemExit("torch is missing: name an interpreter that has it with --peer-python") from None
    torch.set_num_threads(threads)


def peer(op, shapes, settings):
    import torch
    from torch.nn import functional as F

    tensors = [torch.from_numpy(array).requires_grad_() for array in inputs(op, shapes)]
    if op == "adamw":
        for tensor in tensors:
            tensor.grad = tensor.detach() * 0.1
        return torch.optim.AdamW(tensors, fused=True).step, None
    target = torch.arange(shapes[0][0]) * 7 % shapes[0][-1]
    call = {
        "layer_norm": lambda: F.layer_norm(tensors[0], shapes[1], *tensors[1:]),
        "rms_norm": lambda: F.rms_norm(tensors[0], shapes[-1], tensors[-1], 1e-6),
        "gelu": lambda: F.gelu(*tensors, **settings),
        "silu": lambda: F.silu(*tensors),
        "softmax": lambda: F.softmax(*tensors, dim=-1),
        "cross_entropy": lambda: F.cross_entropy(*tensors, target),
        "attention": lambda: F.scaled_dot_product_attention(*tensors, is_causal=settings["causal"]),
    }[op]
    cotangent = torch.ones_like(call())
    return call, lambda y: torch.autograd.grad(y, tensors, cotangent)


def cases(make):
    return {label: functools.partial(make, *case) for label, case in CASES.items()}


if __name__ == "__main__":
    main(__doc__, {"ours": (prepare_ours, cases(ours)), "torch": (prepare_torch, cases(peer))})
