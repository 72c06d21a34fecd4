"""Layers over images (B, C, H, W) and sequences of channels (B, C, L): convolution, pooling, norms by channel."""

import numpy as np

from xuracore import ops
from xuracore.errors import ConfigError, ShapeError
from xuracore.nn import init
from xuracore.nn.module import Module, Parameter
from xuracore.ops.conv2d import pair
from xuracore.tensor import Tensor


# ---------------------------------------------------------------------- convolution
class _Convolution(Module):
    def __init__(self, inputs, outputs, kernel, bias, groups, rng, **settings):
        if groups < 1 or inputs % groups or outputs % groups:
            raise ConfigError(f"{type(self).__name__}: {groups} groups do not divide {inputs} and {outputs} channels")
        shape = self._shape(inputs, outputs, groups, kernel)
        self.weight = Parameter(init.kaiming_uniform(shape, rng, slope=5**0.5))  # ± 1/√fan_in, as in Linear
        self.bias = Parameter(init.zeros(outputs)) if bias else None
        self._settings = dict(settings, groups=groups)

    @staticmethod
    def _shape(inputs, outputs, groups, kernel):
        return outputs, inputs // groups, *kernel

    def extra_repr(self):
        return ", ".join([" × ".join(map(str, self.weight.shape)), *(f"{k}={v}" for k, v in self._settings.items())])


class Conv1d(_Convolution):
    """Convolution of sequences, :func:`xuracore.ops.conv1d`: (B, in, L) → (B, out, length).

    weight (out, in/groups, kernel_size), bias (out).
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 bias=True, *, rng):
        super().__init__(in_channels, out_channels, (kernel_size,), bias, groups, rng, stride=stride,
                         padding=padding, dilation=dilation)

    def forward(self, x):
        return ops.conv1d(x, self.weight, self.bias, **self._settings)


class Conv2d(_Convolution):
    """Convolution of images, :func:`xuracore.ops.conv2d`: (B, in, H, W) → (B, out, oh, ow).

    weight (out, in/groups, kh, kw), bias (out).  Sizes are one number, or one for rows and one for columns.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 bias=True, *, rng):
        super().__init__(in_channels, out_channels, pair(kernel_size), bias, groups, rng, stride=stride,
                         padding=padding, dilation=dilation)

    def forward(self, x):
        return ops.conv2d(x, self.weight, self.bias, **self._settings)


class ConvTranspose2d(_Convolution):
    """The transpose of a convolution, :func:`xuracore.ops.conv_transpose2d`: (B, in, H, W) → (B, out, oh, ow).

    weight (in, out/groups, kh, kw), bias (out).
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1,
                 bias=True, dilation=1, *, rng):
        super().__init__(in_channels, out_channels, pair(kernel_size), bias, groups, rng, stride=stride,
                         padding=padding, output_padding=output_padding, dilation=dilation)

    @staticmethod
    def _shape(inputs, outputs, groups, kernel):
        return inputs, outputs // groups, *kernel

    def forward(self, x):
        return ops.conv_transpose2d(x, self.weight, self.bias, **self._settings)


# ---------------------------------------------------------------------- pooling
class MaxPool2d(Module):
    """Largest element of each window, :func:`xuracore.ops.max_pool2d`."""

    def __init__(self, kernel_size, stride=None, padding=0, dilation=1):
        self._settings = dict(kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)

    def forward(self, x):
        return ops.max_pool2d(x, **self._settings)

    def extra_repr(self):
        return ", ".join(f"{k}={v}" for k, v in self._settings.items())


class AvgPool2d(Module):
    """Mean of each window, :func:`xuracore.ops.avg_pool2d`."""

    def __init__(self, kernel_size, stride=None, padding=0, count_include_pad=True):
        self._settings = dict(kernel_size=kernel_size, stride=stride, padding=padding,
                              count_include_pad=count_include_pad)

    def forward(self, x):
        return ops.avg_pool2d(x, **self._settings)

    def extra_repr(self):
        return ", ".join(f"{k}={v}" for k, v in self._settings.items())


class AdaptiveAvgPool2d(Module):
    """Means over a fixed number of windows, whatever the image's size: :func:`xuracore.ops.adaptive_avg_pool2d`."""

    def __init__(self, output_size):
        self.output_size = output_size

    def forward(self, x):
        return ops.adaptive_avg_pool2d(x, output_size=self.output_size)

    def extra_repr(self):
        return f"{self.output_size}"


# ---------------------------------------------------------------------- norms by channel
class GroupNorm(Module):
    """Normalisation over groups of channels of each example (Wu & He 2018).  weight and bias (num_channels)."""

    def __init__(self, num_groups, num_channels, eps=1e-5):
        if num_groups < 1 or num_channels % num_groups:
            raise ConfigError(f"GroupNorm: {num_groups} groups do not divide {num_channels} channels")
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = Parameter(init.ones(num_channels)), Parameter(init.zeros(num_channels))

    def forward(self, x):
        return ops.group_norm(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps)

    def extra_repr(self):
        return f"{self.num_groups} groups of {self.weight.size} channels, eps={self.eps:g}"


class _BatchNorm(Module):
    _axes = ()

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        if not 0 <= momentum <= 1:
            raise ConfigError(f"{type(self).__name__}: momentum is {momentum}; expected a number in [0, 1]")
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = Parameter(init.ones(num_features)), Parameter(init.zeros(num_features))
        self.register_buffer("running_mean", init.zeros(num_features))
        self.register_buffer("running_var", init.ones(num_features))
        self.register_buffer("num_batches_tracked", np.array(0))

    def forward(self, x):
        shape, channels = x.shape, self.weight.size
        if len(shape) not in self._axes or shape[1] != channels:
            raise ShapeError(f"{type(self).__name__}: x {tuple(shape)}; expected {channels} channels on axis 1 of "
                             f"{' or '.join(map(str, self._axes))}")
        if self.training:
            self._follow(x.data if isinstance(x, Tensor) else x)
            return ops.batch_norm(x, self.weight, self.bias, eps=self.eps)
        across = (channels,) + (1,) * (len(shape) - 2)
        scale = self.weight * (1 / np.sqrt(self.running_var + self.running_var.dtype.type(self.eps)))
        shift = self.bias - scale * self.running_mean
        return x * scale.reshape(across) + shift.reshape(across)

    def _follow(self, x):
        """Move the running statistics a share ``momentum`` of the way to those of this batch."""
        count, axes = x.size // x.shape[1], (0, *range(2, x.ndim))
        if count < 2:
            raise ShapeError(f"{type(self).__name__}: {count} value in each channel; the variance while training "
                             "needs two (after .eval() the running one is used)")
        for running, batch in ((self.running_mean, x.mean(axis=axes)), (self.running_var, x.var(axis=axes, ddof=1))):
            running += running.dtype.type(self.momentum) * (batch - running)
        self.num_batches_tracked += 1

    def extra_repr(self):
        return f"{self.weight.size}, eps={self.eps:g}, momentum={self.momentum:g}"


class BatchNorm1d(_BatchNorm):
    """Normalisation of each channel of (B, C) or (B, C, L) over the batch (Ioffe & Szegedy 2015).

    While training, by the statistics of the batch, which ``running_mean`` and ``running_var`` (unbiased) follow by
    a share ``momentum``; after ``.eval()``, by those.  weight, bias, running_mean and running_var (num_features).
    Under :func:`xuracore.checkpoint` the running statistics move twice, as the batch is seen twice.
    """

    _axes = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Normalisation of each channel of images (B, C, H, W) over the batch; see :class:`BatchNorm1d`."""

    _axes = (4,)
