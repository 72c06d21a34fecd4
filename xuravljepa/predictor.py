"""The predictor: visual tokens and a question in, the embedding of the answer out.

A causal model sees order, so the question is read twice and the answer is pooled from READ tokens that
come last:

    [query] [visual] ([TOOL text]) [query] [READ × m]

Per layer: norm → gate (ANGN) → Mamba-3 mixer → residual.  Then the final norm, the mean over the READ
tokens, ``pred_head``, and L2 normalisation.  What was seen lives in the states, one per layer, so that
``look`` ([query][visual]) and ``read`` ([query][READ]) can be called apart, with a tool's result written
into the states in between.

With ``bidirectional`` layers every token sees both sides.  They read a sequence whole, so the states are then
the segments themselves, as they were seen, and every reading runs through all of them again.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xuracore import nn, ops
from xuracore.config import Config, require, require_positive
from xuracore.errors import ShapeError
from xuracore.nn import init
from xuravljepa import angn
from xuravljepa.layer import Layer
from xuravljepa.tokenizer import PAD, VOCABULARY_SIZE, WORD_BYTES
from xuravljepa.vit import sine_positions

POOLS = ("read", "mean")


@dataclass(frozen=True)
class PredictorConfig(Config):
    """Sizes of the predictor; ``vision_dim`` is the X-Encoder's width, ``embed_dim`` the shared space's."""

    d_model: int = 1024
    n_layers: int = 12
    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    vision_dim: int = 1024
    query_dim: int = 1024
    vocab_size: int = 264
    embed_dim: int = 1536
    n_visual: int = 197  # visual tokens of a picture, [CLS] included
    n_salient: int = 0  # patches that are read, the least usual; 0: all.  Background drowns what stands out
    n_read: int = 4
    gates: bool = True
    bidirectional: bool = False  # a second mixer in each layer reads backwards; no states to write into
    pool: str = "read"  # over the READ tokens; "mean": over the question's words, read last, as well
    max_query: int = 512  # words and marks of a question; longer ones are refused
    norm_eps: float = 1e-5

    def __post_init__(self):
        require_positive(self, "d_model", "n_layers", "d_state", "expand", "headdim", "vision_dim",
                         "query_dim", "embed_dim", "n_visual", "n_read", "max_query")
        require(self.n_salient >= 0, f"n_salient is {self.n_salient}; expected 0, for all, or more")
        require(self.pool in POOLS, f"pool is {self.pool!r}; expected one of {', '.join(POOLS)}")
        require(self.vocab_size >= VOCABULARY_SIZE,
                f"vocab_size is {self.vocab_size}; bytes and special tokens need {VOCABULARY_SIZE}")
        require(self.d_model * self.expand % self.headdim == 0,
                f"expand × d_model {self.d_model * self.expand} is not a multiple of headdim {self.headdim}")


class WordEmbedding(nn.Module):
    """Words as sums of their bytes: Σ_p byte[id_p] ∘ place[p].

    ids (B, W, P) bytes of W words, padded with PAD → (B, W, dim).  One token a word keeps sequences short;
    the place vectors tell "red" from "der", and no word is outside the vocabulary.
    byte (vocabulary, dim), place (P, dim): random signs at the start.
    """

    def __init__(self, vocab_size, width, dim, *, rng):
        self.byte = nn.Parameter(init.normal((vocab_size, dim), rng, 0.5))
        self.place = nn.Parameter(np.where(rng.random((width, dim)) < 0.5, -1, 1).astype(np.float32))

    def forward(self, ids):
        real = (ids != PAD)[..., None].astype(self.byte.dtype)
        return (ops.embedding(self.byte, ids) * real * self.place).sum(axis=2)


class Segment(NamedTuple):
    """Tokens of one kind: h (B, L, d) before the first layer, mask (B, L) True for real ones, modality (L,)."""

    h: object
    mask: np.ndarray
    modality: np.ndarray


class Reading(NamedTuple):
    """What one reading gives: embedding (B, E) of unit length, pooled READ features (B, d), states."""

    embedding: object
    pooled: object
    states: list


class Sight(NamedTuple):
    """Pictures as they are read: tokens (B, n, d), and the place (B, n) of each, or None where they have no number."""

    tokens: object
    places: np.ndarray | None


def place_vectors(n_visual, dim):
    """(n_visual, dim): half a 2-D sine table for a square of patches after [CLS]; zeros for other numbers."""
    side = math.isqrt(max(n_visual - 1, 0))
    return sine_positions(side, dim)[0] * 0.5 if side * side == n_visual - 1 else init.zeros((n_visual, dim))


class Predictor(nn.Module):
    """See the module's text."""

    def __init__(self, config, *, rng):
        self.config = config
        d = config.d_model
        self.token_embedding = WordEmbedding(config.vocab_size, WORD_BYTES, config.query_dim, rng=rng)
        self.query_proj = nn.Linear(config.query_dim, d, rng=rng)
        self.vision_proj = nn.Linear(config.vision_dim, d, rng=rng)
        self.vision_position = nn.Parameter(place_vectors(config.n_visual, d))
        self.register_buffer("vision_mean", np.zeros(config.vision_dim, np.float32))
        self.register_buffer("vision_whiten", np.eye(config.vision_dim, dtype=np.float32))
        self.read_proj = nn.Linear(d, d, bias=False, rng=rng)
        self.read_tokens = nn.Parameter(init.normal((config.n_read, d), rng, 1.0))
        layers = (Layer(config, rng=rng, gates=config.gates, bidirectional=config.bidirectional)
                  for _ in range(config.n_layers))
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.RMSNorm(d, config.norm_eps)
        self.pred_head = nn.Linear(d, config.embed_dim, rng=rng)

    # ------------------------------------------------------------------ segments
    def _query(self, ids, modality=angn.QUERY):
        """ids (B, W, P) padded with PAD → Segment."""
        tokens = self.query_proj(self.token_embedding(ids))
        return Segment(tokens, ids[:, :, 0] != PAD, np.full(ids.shape[1], modality))

    def fit_vision(self, visual, floor=0.3):
        """Choose the fixed map that whitens visual tokens (n, 1 + patches, vision_dim) of training pictures.

        A frozen encoder spends most of its variance on a few facts; whitened, the others are learned as
        fast.  ``floor`` times the mean variance is added to that of every direction, so that noise is not
        made large.
        """
        flat = visual.reshape(-1, visual.shape[-1]).astype(np.float64)
        mean = flat.mean(axis=0)
        variance, axes = np.linalg.eigh(np.cov((flat - mean).T))
        scale = 1 / np.sqrt(variance.clip(0) + floor * variance.mean())
        self.vision_mean[:] = mean
        self.vision_whiten[:] = (axes * scale) @ axes.T

    def sight(self, visual):
        """(B, 1 + patches, vision_dim) array → Sight: [CLS] and, in order, the patches that are read."""
        white = (visual - self.vision_mean) @ self.vision_whiten
        places = np.broadcast_to(np.arange(white.shape[1]), white.shape[:2])
        kept = self.config.n_salient
        if 0 < kept < white.shape[1] - 1:
            surprise = (white[:, 1:] ** 2).sum(axis=-1)  # squared Mahalanobis distance from the usual patch
            chosen = np.sort(np.argsort(-surprise, axis=1, kind="stable")[:, :kept], axis=1) + 1
            places = np.concatenate([np.zeros((len(white), 1), chosen.dtype), chosen], axis=1)
            white = np.take_along_axis(white, places[:, :, None], axis=1)
        tokens = self.vision_proj(white)
        if visual.shape[1] != self.config.n_visual:  # others carry only the encoder's positions
            return Sight(tokens, None)
        return Sight(tokens + ops.embedding(self.vision_position, places), places)

    def _visual(self, visual):
        """(B, 1 + patches, vision_dim) array → Segment."""
        tokens, _ = self.sight(visual)
        return Segment(tokens, np.ones(tokens.shape[:2], bool), np.full(tokens.shape[1], angn.VISUAL))

    def _read(self, question):
        """Segment of READ tokens that know from the start what is asked: each is learned, plus the words."""
        words, mask, _ = question
        count = np.maximum(mask.sum(axis=1, keepdims=True), 1)
        weight = mask / np.sqrt(count)  # a sum of n words grows as √n
        bag = self.read_proj((words * weight[:, :, None]).sum(axis=1))
        tokens = self.read_tokens + bag.reshape(bag.shape[0], 1, bag.shape[1])
        return Segment(tokens, np.ones(tokens.shape[:2], bool), np.full(tokens.shape[1], angn.READ))

    def run(self, segments, states=None, bias=None, bias_layer=None, offsets=None):
        """Run a list of Segments through the layers.

        states : of what came before.   bias : (B, d), added to the stream after layer ``bias_layer`` (the
        residual mode of injection).   offsets : one a layer, that every token reads beside the state.
        Returns hidden (B, L, d) before the final norm, and one state per layer.
        """
        if self.config.bidirectional:
            segments, states = [*(states or []), *segments], None
        h = ops.concatenate(*(s.h for s in segments), axis=1) if len(segments) > 1 else segments[0].h
        mask = np.concatenate([s.mask for s in segments], axis=1)
        mask = None if mask.all() else mask
        modality = np.concatenate([s.modality for s in segments])
        states = [None] * len(self.layers) if states is None else states
        if len(states) != len(self.layers):
            raise ShapeError(f"there are {len(states)} states for {len(self.layers)} layers")
        if bias is not None and not 0 <= bias_layer < len(self.layers):
            raise ShapeError(f"bias_layer is {bias_layer}; there are {len(self.layers)} layers")
        after = []
        for index, (layer, state) in enumerate(zip(self.layers, states)):
            h, state = layer(h, state, mask, modality, None if offsets is None else offsets[index])
            if bias is not None and index == bias_layer:
                h = h + bias.reshape(bias.shape[0], 1, bias.shape[1])
            after.append(state)
        return h, after

    def _answer(self, question, seen, states=None, **injected):
        """[seen][query][READ] after ``states`` → Reading."""
        read = self._read(question)
        h, after = self.run([*seen, question, read], states, **injected)
        if self.config.bidirectional:
            after = [*(states or []), *seen]
        pooled = self.final_norm(h[:, -self.config.n_read :]).mean(axis=1)
        if self.config.pool == "mean":
            mask = np.concatenate([question.mask, read.mask], axis=1)
            weight = (mask / mask.sum(axis=1, keepdims=True)).astype(h.dtype)[:, :, None]
            pooled = (self.final_norm(h[:, -mask.shape[1] :]) * weight).sum(axis=1)
        return Reading(ops.l2_normalize(self.pred_head(pooled)), pooled, after)

    def _take_in(self, segments, states):
        """The states after ``segments``."""
        if self.config.bidirectional:
            return [*(states or []), *segments]
        return self.run(segments, states)[1]

    # ------------------------------------------------------------------ entry points
    def forward(self, query, visual=None, tool=None):
        """The whole sequence at once.

        query (B, W, P) the bytes of its words, padded with PAD; visual (B, n, vision_dim) or None (text
        only); tool (B, W', P) the words of a tool's result, or None.  Returns a :class:`Reading`.
        """
        question = self._query(query)
        seen = [question]
        if visual is not None:
            seen.append(self._visual(visual))
        if tool is not None:
            seen.append(self._query(tool, angn.TOOL))
        return self._answer(question, seen)

    def look(self, query, visual, states=None):
        """[query][visual] → the states after it, one per layer."""
        segments = [self._query(query)] + ([self._visual(visual)] if visual is not None else [])
        return self._take_in(segments, states)

    def hear(self, tool, states):
        """The words (B, W, P) of a tool's result read after ``states`` → the states after it."""
        return self._take_in([self._query(tool, angn.TOOL)], states)

    def hear_token(self, token, states):
        """What a tool said as one token (B, d), read after ``states`` → the states after it."""
        h = token.reshape(token.shape[0], 1, token.shape[1])
        return self._take_in([Segment(h, np.ones(h.shape[:2], bool), np.full(1, angn.TOOL))], states)

    def read(self, query, states, bias=None, bias_layer=None, offsets=None):
        """[query][READ] from given states → :class:`Reading`; ``look`` then ``read`` equals ``forward``."""
        return self._answer(self._query(query), [], states, bias=bias, bias_layer=bias_layer, offsets=offsets)

    def gate_activation(self):
        """(layers, B) mean gate of the last call, or None without gates."""
        if not self.config.gates:
            return None
        return np.stack([layer.gate.activation for layer in self.layers])

