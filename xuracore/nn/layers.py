"""The layers every model here is made of."""

from xuracore import ops
from xuracore.errors import ConfigError
from xuracore.nn import init
from xuracore.nn.module import Module, Parameter


class Linear(Module):
    """y = x Wᵀ + b.  weight (out_features, in_features), bias (out_features)."""

    def __init__(self, in_features, out_features, bias=True, *, rng):
        self.weight = Parameter(init.linear((out_features, in_features), rng))
        self.bias = Parameter(init.zeros(out_features)) if bias else None

    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self):
        out_features, in_features = self.weight.shape
        return f"{in_features} → {out_features}" + ("" if self.bias is not None else ", no bias")


class Embedding(Module):
    """Rows of a table: ids (…) → (…, embedding_dim).  weight (num_embeddings, embedding_dim)."""

    def __init__(self, num_embeddings, embedding_dim, *, rng, std=0.02):
        self.weight = Parameter(init.normal((num_embeddings, embedding_dim), rng, std))

    def forward(self, ids):
        return ops.embedding(self.weight, ids)

    def extra_repr(self):
        return f"{self.weight.shape[0]} × {self.weight.shape[1]}"


class LayerNorm(Module):
    """Layer normalisation over the last axis (Ba et al. 2016)."""

    def __init__(self, dim, eps=1e-5):
        self.weight, self.bias, self.eps = Parameter(init.ones(dim)), Parameter(init.zeros(dim)), eps

    def forward(self, x):
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self):
        return f"{self.weight.size}, eps={self.eps:g}"


class RMSNorm(Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019)."""

    def __init__(self, dim, eps=1e-5):
        self.weight, self.eps = Parameter(init.ones(dim)), eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self):
        return f"{self.weight.size}, eps={self.eps:g}"


class Dropout(Module):
    """Sets a share ``rate`` of the elements to 0 while training, and scales the rest by 1/(1 - rate)."""

    def __init__(self, rate, *, rng):
        if not 0 <= rate < 1:
            raise ConfigError(f"dropout rate is {rate}; expected 0 ≤ rate < 1")
        self.rate, self._rng = rate, rng

    def forward(self, x):
        return ops.dropout(x, self.rate, rng=self._rng, training=self.training)

    def extra_repr(self):
        return f"{self.rate:g}"
