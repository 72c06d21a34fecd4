"""The differentiable ops: ``xc.ops.<name>``.  Each takes Tensors (recorded) or arrays (plain)."""

from xuracore.ops import methods  # noqa: F401  (gives Tensor its operators)
from xuracore.ops.activation import erf, gelu, relu, sigmoid, silu, softplus, tanh
from xuracore.ops.attention import attention
from xuracore.ops.contrastive import info_nce, multi_positive_info_nce, sigmoid_contrastive_loss
from xuracore.ops.convolve import causal_conv1d
from xuracore.ops.elementwise import (
    absolute, add, clip, cos, divide, exp, expm1, log, log1p, maximum, minimum, multiply, negative, power, sin,
    sqrt, subtract, where,
)
from xuracore.ops.index import embedding, getitem
from xuracore.ops.linalg import einsum, linear, matmul
from xuracore.ops.losses import (
    bce_with_logits, cosine_loss, cross_entropy, huber_loss, l1_loss, mse_loss, smooth_l1_loss,
)
from xuracore.ops.normalize import gated_rms_norm, l2_normalize, layer_norm, log_softmax, rms_norm, softmax
from xuracore.ops.reduce import cumsum, logsumexp, max, mean, min, sum, var
from xuracore.ops.registry import REGISTRY, Primitive, primitive
from xuracore.ops.scan import selective_scan
from xuracore.ops.shape import (
    astype, broadcast_to, concatenate, flip, pad, reshape, split, stack, swapaxes, transpose,
)
from xuracore.ops.trapezoid import trapezoidal_scan
from xuracore.ops.unpack import unpack_2, unpack_3, unpack_8
