"""The differentiable ops: ``xc.ops.<name>``.  Each takes Tensors (recorded) or arrays (plain)."""

from xuracore.ops import methods  # noqa: F401  (gives Tensor its operators)
from xuracore.ops.attention import attention
from xuracore.ops.elementwise import (
    absolute, add, clip, cos, divide, exp, expm1, log, log1p, maximum, minimum, multiply, negative, power, sin,
    sqrt, subtract, where,
)
from xuracore.ops.index import embedding, getitem
from xuracore.ops.linalg import einsum, linear, matmul
from xuracore.ops.reduce import cumsum, logsumexp, max, mean, min, sum, var
from xuracore.ops.registry import REGISTRY, Primitive, primitive
from xuracore.ops.shape import (
    astype, broadcast_to, concatenate, flip, pad, reshape, split, stack, swapaxes, transpose,
)
