"""Xura's engine: tensors, a tape, kernels and files, on NumPy alone (Numba where it is installed).

    import xuracore as xc

    w = xc.tensor([[1.0, 2.0]], requires_grad=True)
    (w * w).sum().backward()
    w.grad                                   # [[2, 4]]
"""

from xuracore import io, nn, ops
from xuracore._version import __version__
from xuracore.allocator import keep_freed_memory
from xuracore.anomaly import detect_anomaly
from xuracore.autograd import enable_grad, grad, is_grad_enabled, no_grad, value_and_grad
from xuracore.blas import widen as widen_blas
from xuracore.function import Function
from xuracore.gradcheck import gradcheck
from xuracore.profiler import profile
from xuracore.recompute import checkpoint
from xuracore.tensor import Tensor, tensor
from xuracore.threads import get_num_threads, hold_blas_to_default, set_num_threads

__all__ = [
    "Tensor", "tensor", "no_grad", "enable_grad", "is_grad_enabled", "grad", "value_and_grad", "checkpoint",
    "gradcheck", "Function", "detect_anomaly", "profile", "ops", "nn", "io", "set_num_threads", "get_num_threads",
    "__version__",
]

keep_freed_memory()
widen_blas()
hold_blas_to_default()
del hold_blas_to_default, keep_freed_memory, widen_blas
