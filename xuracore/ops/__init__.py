"""The differentiable ops: ``xc.ops.<name>``.  Each takes Tensors (recorded) or arrays (plain)."""

from xuracore.ops import methods  # noqa: F401  (gives Tensor its operators)
from xuracore.ops.activation import erf, gelu, relu, sigmoid, silu, softplus, tanh
from xuracore.ops.attention import attention
from xuracore.ops.contrastive import info_nce, multi_positive_info_nce, sigmoid_contrastive_loss
from xuracore.ops.conv2d import conv1d, conv2d, conv_transpose2d, fold, patchify, unfold
from xuracore.ops.convolve import causal_conv1d
from xuracore.ops.cumulate import cummax, cummin, cumprod, cumsum, logcumsumexp
from xuracore.ops.dropout import dropout
from xuracore.ops.elementwise import (
    absolute, add, atan2, clip, cos, divide, exp, expm1, hardtanh, lerp, log, log1p, logaddexp, masked_fill,
    maximum, minimum, multiply, nan_to_num, negative, power, remainder, sin, sqrt, subtract, where,
)
from xuracore.ops.functions import (
    acos, acosh, asin, asinh, atan, atanh, ceil, cosh, elu, exp2, floor, hardswish, heavy_tail, leaky_relu, log2,
    log10, log_sigmoid, mish, reciprocal, round, rsqrt, sign, sinh, softsign, square, tan, trunc,
)
from xuracore.ops.group_norm import batch_norm, group_norm, instance_norm
from xuracore.ops.index import (
    embedding, gather, getitem, index_add, index_select, one_hot, scatter_add, take, take_along_axis,
)
from xuracore.ops.linalg import dot, einsum, linear, matmul, outer
from xuracore.ops.linear_state import fft_conv, linear_state_scan, s4_kernel, s4d_kernel
from xuracore.ops.losses import (
    bce_with_logits, binary_cross_entropy, cosine_embedding_loss, cosine_loss, cross_entropy, huber_loss, kl_div,
    l1_loss, mse_loss, nll_loss, smooth_l1_loss, triplet_margin_loss,
)
from xuracore.ops.normalize import gated_rms_norm, l2_normalize, layer_norm, log_softmax, rms_norm, softmax
from xuracore.ops.order import argsort, median, sort, topk
from xuracore.ops.pool import adaptive_avg_pool2d, avg_pool1d, avg_pool2d, max_pool1d, max_pool2d
from xuracore.ops.rearrange import (
    diag, diagonal, repeat, repeat_interleave, roll, tile, tril, triu, windows,
)
from xuracore.ops.reduce import (
    all, amax, amin, any, argmax, argmin, logsumexp, max, mean, min, norm, prod, std, sum, var,
)
from xuracore.ops.registry import REGISTRY, Primitive, primitive
from xuracore.ops.resize import interpolate
from xuracore.ops.rotary import rope
from xuracore.ops.scan import selective_scan
from xuracore.ops.shape import (
    astype, broadcast_to, chunk, concatenate, expand_dims, flatten, flip, moveaxis, pad, permute, reshape, split,
    squeeze, stack, swapaxes, transpose, unsqueeze, unstack,
)
from xuracore.ops.spread import covariance_penalty, uniformity_loss, variance_hinge, vicreg_loss
from xuracore.ops.ssd import ssd_scan
from xuracore.ops.trapezoid import trapezoidal_scan
from xuracore.ops.unpack import unpack_2, unpack_3, unpack_8
