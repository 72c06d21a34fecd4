"""The Y-Decoder: an embedding becomes text, one byte at a time.

The embedding is turned into ``prefix_length`` vectors that stand in front of the text; the same form
is used in training and inference.  The output head is tied to the embedding table.

One embedding of a whole caption names the objects of a picture, but hardly keeps their order.  So with
``look_dim`` every layer ends in a look at the picture as the predictor reads it (``Predictor.sight``): an
attention from each position of the text to all tokens of the picture.  The embedding says what is asked, the
picture how it is.  Without a picture nothing is added, and the text comes from the embedding alone.
"""

import heapq
import operator
from dataclasses import dataclass

import numpy as np

from xuracore import nn, no_grad, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ShapeError
from xuracore.tensor import Tensor
from xuravljepa.layer import Layer
from xuravljepa.predictor import Sight, place_vectors
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
    max_length: int = 256
    embed_dim: int = 1536
    norm_eps: float = 1e-5
    look_dim: int = 0  # width of the picture's tokens that the layers look at, the predictor's; 0: they cannot
    look_places: int = 0  # places of the picture that a token may have

    def __post_init__(self):
        require_positive(self, "d_model", "n_layers", "d_state", "expand", "headdim", "embed_dim",
                         "prefix_length")
        require(self.max_length >= 2, f"max_length is {self.max_length}; BOS and EOS alone need 2")
        require(self.vocab_size >= VOCABULARY_SIZE,
                f"vocab_size is {self.vocab_size}; bytes and special tokens need {VOCABULARY_SIZE}")
        require(min(self.look_dim, self.look_places) >= 0, f"look_dim is {self.look_dim} and look_places "
                f"{self.look_places}; expected 0, for none, or more")
        require(not self.look_dim or self.d_model % self.look_heads == 0,
                f"d_model {self.d_model} is not a multiple of {self.look_heads} heads, as many as the mixer has")

    @property
    def look_heads(self):
        """Heads of a look: as many as a mixer has."""
        return max(1, self.d_model * self.expand // self.headdim)


class Look(nn.Module):
    """h (B, L, d), seen (B, M, d) → h + attention(norm h, seen).  At first it adds nothing."""

    def __init__(self, config, *, rng):
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = nn.MultiheadAttention(config.d_model, config.look_heads, bias=False, rng=rng)
        self.attention.out_proj.weight.data[:] = 0

    def forward(self, h, seen):
        return h + self.attention(self.norm(h), seen)


class Decoder(nn.Module):
    """embedding (B, E) and tokens (B, L), starting with BOS → logits (B, L, vocabulary) of the next token.

    sight : of every method that has it, the Sight of B pictures; None, or a decoder that cannot look: the
    embedding alone.
    """

    def __init__(self, config, *, rng):
        self.config = config
        self.embed_to_prefix = nn.Linear(config.embed_dim, config.prefix_length * config.d_model, rng=rng)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model, rng=rng,
                                            std=config.d_model**-0.5)
        self.layers = nn.ModuleList(Layer(config, rng=rng) for _ in range(config.n_layers))
        if config.look_dim:
            self.look_proj = nn.Linear(config.look_dim, config.d_model, rng=rng)
            self.look_position = nn.Parameter(place_vectors(config.look_places, config.d_model))
            self.looks = nn.ModuleList(Look(config, rng=rng) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self._tokenizer = ByteTokenizer()

    def _seen(self, sight):
        """Sight → (B, M, d), or None."""
        if sight is None or not self.config.look_dim:
            return None
        seen = self.look_proj(sight.tokens)
        return seen if sight.places is None else seen + ops.embedding(self.look_position, sight.places)

    def _run(self, h, states, mask=None, seen=None):
        after = []
        for i, (layer, state) in enumerate(zip(self.layers, states or [None] * len(self.layers))):
            h, state = layer(h, state, mask)
            if seen is not None:
                h = self.looks[i](h, seen)
            after.append(state)
        return h, after

    def _logits(self, h):
        return ops.linear(self.final_norm(h), self.token_embedding.weight)

    def prefix(self, embedding):
        """(B, E) → (B, prefix_length, d_model)."""
        return self.embed_to_prefix(embedding).reshape(-1, self.config.prefix_length, self.config.d_model)

    def forward(self, embedding, tokens, sight=None):
        prefix = self.prefix(embedding)
        h = ops.concatenate(prefix, self.token_embedding(tokens), axis=1)
        mask = np.concatenate([np.ones(prefix.shape[:2], bool), tokens != PAD], axis=1)
        h, _ = self._run(h, None, None if mask.all() else mask, self._seen(sight))
        return self._logits(h[:, self.config.prefix_length :])

    def loss(self, embedding, tokens, label_smoothing=0.0, sight=None):
        """Mean cross-entropy of each token given those before it; tokens (B, L) from BOS to EOS, then PAD."""
        logits = self.forward(embedding, tokens[:, :-1], sight)
        return ops.cross_entropy(logits.reshape(-1, self.config.vocab_size), tokens[:, 1:].reshape(-1),
                                 ignore_index=PAD, label_smoothing=label_smoothing)

    def tokens(self, texts):
        """ids (n, L) of texts, from BOS to EOS, then PAD.  ShapeError for one that exceeds ``max_length``."""
        limit = self.config.max_length - 2
        return pad_rows([[BOS, *self._tokenizer.encode(text, limit), EOS] for text in texts])

    @no_grad()
    def log_probability(self, embedding, texts, sight=None):
        """(n,) float64: of each of n texts given one embedding (E,), all its bytes and the end; for choosing exactly.

        ``generate(allowed=…)`` takes the likeliest byte at each fork, which is faster with very many texts but may
        leave the likeliest text at the first.  Raises ShapeError as ``tokens`` does, and for no texts.
        """
        if not len(texts):
            raise ShapeError("there are no texts to choose from")
        ids = self.tokens(texts)
        given = np.broadcast_to(_array(embedding).reshape(1, -1), (len(ids), self.config.embed_dim))
        sight = sight and Sight(*(part if part is None else np.repeat(part, len(ids), axis=0) for part in sight))
        scores = ops.log_softmax(self.forward(given, ids[:, :-1], sight), axis=-1).data.astype(np.float64)
        said = np.take_along_axis(scores, ids[:, 1:, None], axis=2)[:, :, 0]
        return (said * (ids[:, 1:] != PAD)).sum(axis=1)

    @no_grad()
    def write(self, embeddings, max_length=None, sight=None):
        """The texts (n strings) of n embeddings (n, E): as ``generate`` without ``allowed``, all at once."""
        limit = self._limit(max_length)
        given, seen = _array(embeddings), self._seen(sight)
        _, states = self._run(self.prefix(given), None, None, seen)
        free, token = np.array(_FREE), np.full(len(given), BOS)
        ids, running = [], np.ones(len(given), bool)
        while running.any() and len(ids) < limit - 1:
            h, states = self._run(self.token_embedding(token[:, None]), states, None, seen)
            token = np.where(running, free[self._logits(h).data[:, -1, free].argmax(axis=1)], EOS)
            running &= token != EOS
            ids.append(token)
        rows = np.stack(ids, axis=1) if ids else np.zeros((len(given), 0), np.int64)
        return [self._tokenizer.decode(row) for row in rows]

    def _limit(self, max_length):
        limit = self.config.max_length if max_length is None else min(max_length, self.config.max_length)
        if limit < 2:
            raise ShapeError(f"max_length is {max_length}; BOS and EOS alone need 2")
        return limit

    @no_grad()
    def generate(self, embedding, max_length=None, allowed=None, beams=1, sight=None):
        """The most likely text for one embedding (E,) or (1, E), byte by byte.

        max_length : tokens at most, BOS and EOS included; by default, and never more than, the config's.
        allowed : a list of texts; the answer is then one of them (constrained decoding over their trie).
        beams : how many beginnings are followed; 1 is greedy, more find likelier texts.
        Returns (text, mean log-probability of its tokens).  ShapeError if an allowed text is too long, or
        there is none, or the embedding is not one, or beams is below 1.
        """
        limit, follow = self._limit(max_length), _FREE
        if beams < 1:
            raise ShapeError(f"beams is {beams}; expected 1 or more")
        if allowed is not None:
            follow = _trie([self._tokenizer.encode(text, limit - 2) for text in allowed])
            if not follow:
                raise ShapeError("no texts are allowed; pass None for free decoding")
        seen = self._seen(sight)
        _, states = self._run(self.prefix(_array(embedding).reshape(1, -1)), None, None, seen)
        live, done, token = [(0.0, (), follow)], [], np.array([[BOS]])
        while live and len(live[0][1]) < limit - 1:
            if seen is not None and len(seen.data) != len(token):
                seen = seen[np.zeros(len(token), np.int64)]  # each beginning sees the same picture
            h, states = self._run(self.token_embedding(token), states, None, seen)
            logits = self._logits(h).data[:, -1].astype(np.float64)
            logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
            forks = [(total + logits[i, token], i, token) for i, (total, _, follow) in enumerate(live)
                     for token in follow]
            forks = heapq.nlargest(beams, forks, key=operator.itemgetter(0))
            done += [(total, (*live[i][1], EOS)) for total, i, token in forks if token == EOS]
            best = max(done)[0] if done else -np.inf
            forks = [fork for fork in forks if fork[2] != EOS and fork[0] > best]  # longer texts only get less likely
            live = [(total, (*live[i][1], token), live[i][2] if allowed is None else live[i][2][token])
                    for total, i, token in forks]
            if [i for _, i, _ in forks] != list(range(len(token))):
                states = [type(state)(*(part[[i for _, i, _ in forks]] for part in state)) for state in states]
            token = np.array([[token] for _, _, token in forks])
        total, ids = max([*done, *((total, ids) for total, ids, _ in live)], key=operator.itemgetter(0))
        return self._tokenizer.decode(ids), total / len(ids)


def _array(embedding):
    return embedding.data if isinstance(embedding, Tensor) else np.asarray(embedding)


def _trie(sequences):
    """Nested dicts: token → what may follow, ending in EOS."""
    root = {}
    for ids in sequences:
        node = root
        for token in (*ids, EOS):
            node = node.setdefault(int(token), {})
    return root
