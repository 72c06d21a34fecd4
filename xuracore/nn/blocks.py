"""Blocks of a transformer: multi-head attention, and the two usual perceptrons."""

from xuracore import ops
from xuracore.errors import ConfigError, ShapeError
from xuracore.nn import init
from xuracore.nn.containers import activation
from xuracore.nn.layers import Linear
from xuracore.nn.module import Module, Parameter


class MultiheadAttention(Module):
    """Attention of several heads with its projections (Vaswani et al. 2017, §3.2.2): (B, L, E) → (B, L, E).

    in_proj_weight (3 E, E) and in_proj_bias (3 E) hold queries, keys and values in this order; out_proj is a
    Linear.  The names and the numbers are those of torch.nn.MultiheadAttention with ``batch_first``.
    """

    def __init__(self, embed_dim, num_heads, bias=True, *, rng):
        if num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(f"MultiheadAttention: {num_heads} heads do not divide a width of {embed_dim}")
        self.num_heads = num_heads
        self.in_proj_weight = Parameter(init.xavier_uniform((3 * embed_dim, embed_dim), rng))
        self.in_proj_bias = Parameter(init.zeros(3 * embed_dim)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, rng=rng)

    def forward(self, query, key=None, value=None, mask=None, causal=False):
        """query (B, L, E); key, value (B, M, E), by default the query and the key.

        mask : boolean, broadcastable to (B, heads, L, M), True where a key may be seen.   causal : no key from
        the future.  See :func:`xuracore.ops.attention`.
        """
        key = query if key is None else key
        value = key if value is None else value
        if key is query and value is query:
            parts = ops.unpack_3(self._project(query, slice(None)), sizes=(query.shape[-1],) * 3)
        else:
            width = self.in_proj_weight.shape[1]
            spans = (slice(i * width, (i + 1) * width) for i in range(3))
            parts = [self._project(x, span) for x, span in zip((query, key, value), spans)]
        y = ops.attention(*map(self._heads, parts), mask=mask, causal=causal)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(*query.shape))

    def _project(self, x, span):
        width = self.in_proj_weight.shape[1]
        if len(x.shape) != 3 or x.shape[-1] != width:
            raise ShapeError(f"MultiheadAttention: an input has shape {tuple(x.shape)}; expected (B, L, {width})")
        return ops.linear(x, self.in_proj_weight[span], None if self.in_proj_bias is None else self.in_proj_bias[span])

    def _heads(self, x):
        batch, length, width = x.shape
        return x.reshape(batch, length, self.num_heads, width // self.num_heads).transpose(0, 2, 1, 3)

    def extra_repr(self):
        return f"{self.in_proj_weight.shape[1]}, {self.num_heads} heads"


class MLP(Module):
    """fc2(activation(fc1(x))): ``dim`` → ``hidden`` → ``out`` (default ``dim``)."""

    def __init__(self, dim, hidden, out=None, activation="gelu", bias=True, *, rng):
        self.activation = activation
        self.fc1 = Linear(dim, hidden, bias, rng=rng)
        self.fc2 = Linear(hidden, dim if out is None else out, bias, rng=rng)
        _checked(activation)

    def forward(self, x):
        return self.fc2(activation(self.activation)(self.fc1(x)))

    def extra_repr(self):
        return self.activation


class GatedMLP(Module):
    """down_proj(activation(gate_proj(x)) · up_proj(x)) (Shazeer 2020), with Llama's names; SwiGLU by default."""

    def __init__(self, dim, hidden, activation="silu", bias=False, *, rng):
        self.activation = activation
        self.gate_proj, self.up_proj = (Linear(dim, hidden, bias, rng=rng) for _ in range(2))
        self.down_proj = Linear(hidden, dim, bias, rng=rng)
        _checked(activation)

    def forward(self, x):
        return self.down_proj(activation(self.activation)(self.gate_proj(x)) * self.up_proj(x))

    def extra_repr(self):
        return self.activation


def _checked(name):
    """ConfigError now, not in the first forward."""
    activation(name)
