"""Language models on a stack of mixers: tokens in, logits and a state of constant size out."""

from dataclasses import dataclass, field

import numpy as np

from xuracore import nn, ops
from xuracore.autograd import is_grad_enabled, no_grad
from xuracore.config import Config, require
from xuracore.errors import ShapeError
from xuracore.nn import Module
from xuracore.tensor import Tensor
from xuramamba import pretrained
from xuramamba.block import Stack, StackConfig
from xuramamba.decode import decoder_of
from xuramamba.generate import generate


@dataclass(frozen=True)
class LanguageModelConfig(Config):
    """Sizes of a language model; those of its stack are explained at :class:`StackConfig`."""

    vocab_size: int
    d_model: int
    n_layer: int
    mixer: str = "mamba3"
    mixer_fields: dict = field(default_factory=dict)
    d_intermediate: int = 0
    mlp_multiple_of: int = 128
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1  # rows of the table are rounded up to this; no id names the others
    layer_types: tuple[str, ...] = ()
    rms_norm: bool = True
    eos_token_ids: tuple[int, ...] = ()  # ids that end a text

    def __post_init__(self):
        require(self.vocab_size > 0, f"vocab_size={self.vocab_size}; expected a positive number")
        require(
            self.pad_vocab_size_multiple > 0,
            f"pad_vocab_size_multiple={self.pad_vocab_size_multiple}; expected a positive number",
        )
        require(
            all(0 <= i < self.vocab_size for i in self.eos_token_ids),
            f"eos_token_ids are {self.eos_token_ids}; the vocabulary has {self.vocab_size}",
        )
        self.stack  # refuses what does not fit together

    @property
    def padded_vocab_size(self):
        """Rows of the embedding table, and the width of the logits."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def stack(self):
        return StackConfig(
            self.d_model, self.n_layer, self.mixer, self.mixer_fields, self.d_intermediate,
            self.mlp_multiple_of, self.norm_eps, self.layer_types, self.rms_norm,
        )  # fmt: skip


class Backbone(Stack):
    """Embedding and stack: ``hidden, state = backbone(token_ids, state=None)``, hidden (B, L, d_model)."""

    def __init__(self, config, *, rng):
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, rng=rng)
        super().__init__(config.stack, rng=rng)
        self._vocab_size = config.vocab_size

    def forward(self, token_ids, state=None, **options):
        return super().forward(self.embedding(self.checked(token_ids)), state, **options)

    def checked(self, token_ids):
        """token_ids as an array (B, L); ShapeError for anything but ids of the vocabulary."""
        ids = np.asarray(token_ids.data if isinstance(token_ids, Tensor) else token_ids)
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype.kind not in "iu":
            raise ShapeError(f"token_ids: shape {ids.shape}, type {ids.dtype}; expected (B, L ≥ 1) integers")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ShapeError(
                f"token_ids go from {ids.min()} to {ids.max()}; the vocabulary has {self._vocab_size}: "
                "was the text encoded with another tokenizer?"
            )
        return ids


class LanguageModel(Module):
    """``logits, state = lm(token_ids, state=None)``, token_ids (B, L) whole numbers.

    logits (B, L, padded_vocab_size).  state carries the past: a model fed token by token, or in pieces
    of any length, gives the logits of the whole sequence.  Keywords (``mask``, ``cu_seqlens``) are
    handed to every mixer.  Parameters have the names of the published checkpoints.

    >>> config = LanguageModelConfig(vocab_size=256, d_model=64, n_layer=2, mixer="mamba1")
    >>> lm = LanguageModel(config, rng=np.random.default_rng(0))
    >>> logits, state = lm(np.array([[104, 105]]))
    """

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.backbone = Backbone(config, rng=rng)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, rng=rng)

    def initial_state(self, batch):
        """The state before the first token."""
        return self.backbone.initial_state(batch)

    def logits(self, hidden):
        """Scores of the next token from ``hidden`` (…, d_model)."""
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        table = self.backbone.embedding
        return ops.linear(hidden, table.weight) if isinstance(table, nn.Embedding) else table.project(hidden)

    def forward(self, token_ids, state=None, **options):
        if state is not None and not options and not is_grad_enabled() and np.shape(token_ids)[1:] == (1,):
            session = decoder_of(self).session(state)
            logits = session.step(self.backbone.checked(token_ids)[:, 0])
            return Tensor(logits[:, None]), session.state
        hidden, state = self.backbone(token_ids, state, **options)
        return self.logits(hidden), state

    def generate(
        self, token_ids, max_new_tokens=64, temperature=0.0, top_k=None, top_p=None, rng=None, stop=None,
        stream=None, **options,
    ):  # fmt: skip
        """Continue ``token_ids``; see :func:`xuramamba.generate.generate`."""
        with no_grad():
            return generate(
                self, token_ids, max_new_tokens, temperature, top_k, top_p, rng, stop, stream, **options
            )

    def save_pretrained(self, directory, format="xura"):
        """Write config.json and model.safetensors into ``directory``, created if missing.

        format : ``"xura"``, or ``"huggingface"`` for a folder that transformers opens with the same
            logits (Mamba, Mamba-2 and FalconMamba; ConfigError for what it has no class for).
        """
        pretrained.save(self, directory, format)

    @classmethod
    def from_pretrained(cls, directory, *, dtype=None, mixer_fields=None):
        """Read a folder: our own, Hugging Face's (Mamba, Mamba-2, FalconMamba) or state-spaces'.

        See :func:`xuramamba.pretrained.load` for the files, the options and the errors.
        """
        return pretrained.load(cls, LanguageModelConfig, directory, dtype, mixer_fields)
