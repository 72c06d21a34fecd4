"""Language models on a stack of mixers: tokens in, logits and a state of constant size out."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xuracore import io, nn, ops
from xuracore.autograd import no_grad
from xuracore.config import Config, require
from xuracore.errors import ShapeError
from xuracore.nn import Module
from xuracore.tensor import Tensor
from xuramamba.block import Stack, StackConfig
from xuramamba.generate import generate

MODEL_TYPE = "xura_language_model"


@dataclass(frozen=True)
class LanguageModelConfig(Config):
    """Sizes of a language model; ``mixer_fields`` go to every mixer as they are."""

    vocab_size: int
    d_model: int
    n_layer: int
    mixer: str = "mamba3"
    mixer_fields: dict = field(default_factory=dict)
    d_intermediate: int = 0
    mlp_multiple_of: int = 128
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self):
        require(self.vocab_size > 0, f"vocab_size={self.vocab_size}; expected a positive number")
        self.stack  # refuses what does not fit together

    @property
    def stack(self):
        return StackConfig(
            self.d_model, self.n_layer, self.mixer, self.mixer_fields, self.d_intermediate,
            self.mlp_multiple_of, self.norm_eps,
        )  # fmt: skip


class Backbone(Stack):
    """Embedding and stack: ``hidden, state = backbone(token_ids, state=None)``."""

    def __init__(self, config, *, rng):
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, rng=rng)
        super().__init__(config.stack, rng=rng)

    def forward(self, token_ids, state=None, **options):
        return super().forward(self.embedding(token_ids), state, **options)


class LanguageModel(Module):
    """``logits, state = lm(token_ids, state=None)``, token_ids (B, L) whole numbers.

    logits (B, L, vocab_size).  state carries the past: a model fed token by token gives the logits
    of the whole sequence.
    """

    def __init__(self, config, *, rng=None):
        rng = np.random.default_rng(0) if rng is None else rng
        self.config = config
        self.backbone = Backbone(config, rng=rng)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, rng=rng)

    def initial_state(self, batch):
        """The state before the first token."""
        return self.backbone.initial_state(batch)

    def logits(self, hidden):
        """Scores of the next token from ``hidden`` (…, d_model)."""
        tied = self.config.tie_embeddings
        return ops.linear(hidden, self.backbone.embedding.weight if tied else self.lm_head.weight)

    def forward(self, token_ids, state=None, **options):
        ids = np.asarray(token_ids.data if isinstance(token_ids, Tensor) else token_ids)
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.dtype.kind not in "iu":
            raise ShapeError(f"token_ids: shape {ids.shape}, type {ids.dtype}; expected (B, L ≥ 1) integers")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ShapeError(
                f"token_ids go from {ids.min()} to {ids.max()}; the vocabulary has {self.config.vocab_size}"
            )
        hidden, state = self.backbone(ids, state, **options)
        return self.logits(hidden), state

    def generate(
        self, token_ids, max_new_tokens=64, temperature=0.0, top_k=None, top_p=None, rng=None, stop=None,
        stream=None,
    ):  # fmt: skip
        """Continue ``token_ids`` (B, L); see :func:`xuramamba.generate.generate`."""
        with no_grad():
            return generate(self, token_ids, max_new_tokens, temperature, top_k, top_p, rng, stop, stream)

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors into ``directory``, created if missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        io.save_safetensors(directory / "model.safetensors", self.state_dict())
        io.save_json(directory / "config.json", {"model_type": MODEL_TYPE, **self.config.to_dict()})

    @classmethod
    def from_pretrained(cls, directory):
        """Read what :meth:`save_pretrained` wrote."""
        directory = Path(directory)
        fields = dict(io.load_json(directory / "config.json"))
        kind = fields.pop("model_type", None)
        require(
            kind == MODEL_TYPE,
            f"{directory / 'config.json'}: model_type is {kind!r}; expected {MODEL_TYPE!r}",
        )
        model = cls(LanguageModelConfig.from_dict(fields))
        model.load_state_dict(io.load_safetensors(directory / "model.safetensors"))
        return model
