"""The Y-Encoder: a text becomes a unit vector in the space the predictor aims at.

    bytes + EOS → embedding → Mamba-3 layers → norm → mean over the real tokens → projection → L2
"""

from dataclasses import dataclass

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ShapeError
from xuravljepa.layer import Layer
from xuravljepa.tokenizer import EOS, PAD, VOCABULARY_SIZE, ByteTokenizer, pad_rows


@dataclass(frozen=True)
class TextEncoderConfig(Config):
    """Sizes of the Y-Encoder; ``max_length`` in tokens, EOS included."""

    d_model: int = 768
    n_layers: int = 12
    d_state: int = 64
    expand: int = 2
    headdim: int = 32
    vocab_size: int = 264
    max_length: int = 512
    embed_dim: int = 1536
    norm_eps: float = 1e-5

    def __post_init__(self):
        require_positive(self, "d_model", "n_layers", "d_state", "expand", "headdim", "embed_dim",
                         "max_length")
        require(self.vocab_size >= VOCABULARY_SIZE,
                f"vocab_size is {self.vocab_size}; bytes and special tokens need {VOCABULARY_SIZE}")


class TextEncoder(nn.Module):
    """ids (B, L) padded with PAD → (B, embed_dim) of unit length.  Padding never changes a result."""

    def __init__(self, config, *, rng):
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, rng=rng, std=1.0)
        self.layers = nn.ModuleList(Layer(config, rng=rng) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.projection = nn.Linear(config.d_model, config.embed_dim, rng=rng)
        self._tokenizer = ByteTokenizer()

    def forward(self, ids):
        mask = ids != PAD
        h = self.embedding(ids)
        for layer in self.layers:
            h, _ = layer(h, mask=None if mask.all() else mask)
        weight = (mask / mask.sum(axis=1, keepdims=True)).astype(h.dtype)[:, :, None]
        pooled = (self.final_norm(h) * weight).sum(axis=1)
        return ops.l2_normalize(self.projection(pooled))

    def tokens(self, texts):
        """ids (n, L) of texts, each followed by EOS.

        ShapeError if there are none or one exceeds ``max_length``, DTypeError for what is no text.
        """
        if not len(texts):
            raise ShapeError("there are no texts to encode")
        rows = [[*self._tokenizer.encode(text, self.config.max_length - 1), EOS] for text in texts]
        return pad_rows(rows)

    def encode(self, texts):
        """A list of texts → (n, embed_dim).  Raises as :meth:`tokens` does.

        The long ones are run apart, so that answers of a word are not padded to the length of captions.
        """
        ids = self.tokens(texts)
        length = (ids != PAD).sum(axis=1)
        long = length > 3 * np.median(length)
        if not long.any():
            return self(ids)
        apart = self(ids[~long, : length[~long].max()]), self(ids[long])
        order = np.concatenate([np.flatnonzero(~long), np.flatnonzero(long)])
        return ops.concatenate(*apart, axis=0)[np.argsort(order)]
