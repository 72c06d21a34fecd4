"""The Y-Decoder: an embedding becomes text, one byte at a time.

The embedding is turned into ``prefix_length`` vectors that stand in front of the text; the same form
is used in training and inference.  The output head is tied to the embedding table.
"""

from dataclasses import dataclass

import numpy as np

from xuracore import nn, no_grad, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ShapeError
from xuracore.tensor import Tensor
from xuravljepa.layer import Layer
from xuravljepa.tokenizer import BOS, EOS, PAD, VOCABULARY_SIZE, ByteTokenizer, pad_rows

_FREE = (*range(256), EOS)  # what may follow any text: a byte, or the end


@dataclass(frozen=True)
class DecoderConfig(Config):
    """Sizes of the Y-Decoder; ``max_length`` in tokens, BOS and EOS included."""

    d_model: int = 512
    n_layers: int = 6
    d_state: int = 64
    expand: int = 2
    headdim: int = 32
    vocab_size: int = 264
    prefix_length: int = 8
    max_length: int = 128
    embed_dim: int = 1536
    norm_eps: float = 1e-5

    def __post_init__(self):
        require_positive(self, "d_model", "n_layers", "d_state", "expand", "headdim", "embed_dim",
                         "prefix_length")
        require(self.max_length >= 2, f"max_length is {self.max_length}; BOS and EOS alone need 2")
        require(self.vocab_size >= VOCABULARY_SIZE,
                f"vocab_size is {self.vocab_size}; bytes and special tokens need {VOCABULARY_SIZE}")


class Decoder(nn.Module):
    """embedding (B, E) and tokens (B, L), starting with BOS → logits (B, L, vocabulary) of the next token."""

    def __init__(self, config, *, rng):
        self.config = config
        self.embed_to_prefix = nn.Linear(config.embed_dim, config.prefix_length * config.d_model, rng=rng)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, rng=rng,
                                            std=config.d_model**-0.5)
        self.layers = nn.ModuleList(Layer(config, rng=rng) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self._tokenizer = ByteTokenizer()

    def _run(self, h, states, mask=None):
        after = []
        for layer, state in zip(self.layers, states or [None] * len(self.layers)):
            h, state = layer(h, state, mask)
            after.append(state)
        return h, after

    def _logits(self, h):
        return ops.linear(self.final_norm(h), self.token_embedding.weight)

    def prefix(self, embedding):
        """(B, E) → (B, prefix_length, d_model)."""
        return self.embed_to_prefix(embedding).reshape(-1, self.config.prefix_length, self.config.d_model)

    def forward(self, embedding, tokens):
        prefix = self.prefix(embedding)
        h = ops.concatenate(prefix, self.token_embedding(tokens), axis=1)
        mask = np.concatenate([np.ones(prefix.shape[:2], bool), tokens != PAD], axis=1)
        h, _ = self._run(h, None, None if mask.all() else mask)
        return self._logits(h[:, self.config.prefix_length :])

    def loss(self, embedding, tokens, label_smoothing=0.0):
        """Mean cross-entropy of each token given those before it; tokens (B, L) from BOS to EOS, then PAD."""
        logits = self.forward(embedding, tokens[:, :-1])
        return ops.cross_entropy(logits.reshape(-1, self.config.vocab_size), tokens[:, 1:].reshape(-1),
                                 ignore_index=PAD, label_smoothing=label_smoothing)

    def text_loss(self, embedding, texts, label_smoothing=0.0):
        """``loss`` of texts (B strings) given embeddings (B, E).  ShapeError for a text that is too long."""
        limit = self.config.max_length - 2
        ids = pad_rows([[BOS, *self._tokenizer.encode(text, limit), EOS] for text in texts])
        return self.loss(embedding, ids, label_smoothing)

    @no_grad()
    def generate(self, embedding, max_length=None, allowed=None):
        """The most likely text for one embedding (E,) or (1, E): greedy, byte by byte.

        max_length : tokens at most, BOS and EOS included; by default, and never more than, the config's.
        allowed : a list of texts; the answer is then one of them (constrained decoding over their trie).
        Returns (text, mean log-probability of its tokens).  ShapeError if an allowed text is too long, or
        there is none, or the embedding is not one.
        """
        limit = self.config.max_length if max_length is None else min(max_length, self.config.max_length)
        if limit < 2:
            raise ShapeError(f"max_length is {max_length}; BOS and EOS alone need 2")
        choices = _FREE
        if allowed is not None:
            choices = _trie([self._tokenizer.encode(text, limit - 2) for text in allowed])
            if not choices:
                raise ShapeError("no texts are allowed; pass None for free decoding")
        given = embedding.data if isinstance(embedding, Tensor) else np.asarray(embedding)
        _, states = self._run(self.prefix(given.reshape(1, -1)), None)
        token, scores, ids = BOS, [], []
        while token != EOS and len(scores) < limit - 1:
            h, states = self._run(self.token_embedding(np.array([[token]])), states)
            logits = self._logits(h).data[0, -1].astype(np.float64)
            token = max(choices, key=logits.__getitem__)
            scores.append(logits[token] - np.logaddexp.reduce(logits))
            ids.append(token)
            choices = choices if allowed is None else choices[token]
        return self._tokenizer.decode(ids), float(np.mean(scores))


def _trie(sequences):
    """Nested dicts: token → what may follow, ending in EOS."""
    root = {}
    for ids in sequences:
        node = root
        for token in (*ids, EOS):
            node = node.setdefault(int(token), {})
    return root
