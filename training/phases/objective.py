"""What phase 1 minimises between predicted embeddings and those of the answers.

    nce      unique targets, several positives each: equal answers are one target (the default)
    paired   InfoNCE between the pairs of the batch, as published; equal answers repel each other
    sigmoid  every pair judged alone, with a learned bias
    cosine, l1, l2   regression, which needs targets that stand still
    vicreg   regression, with variance and covariance instead of negatives

The targets come from the Y-Encoder as it learns (``online``), from one that does not (``frozen``), or from a
slow average of it (``ema``).  In the last case the predictor aims at the average, and the Y-Encoder at what
the predictor says, each without moving the other: ½ D(p, average) + ½ D(stopped p, q).
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from training.parallel import ALONE, shared
from xuracore import no_grad, nn, ops, versions
from xuracore.config import Config, require
from xuracore.tensor import Tensor
from xuravljepa.text import TextEncoder

LOSSES = ("nce", "paired", "sigmoid", "cosine", "l1", "l2", "vicreg")
REGRESSIONS = ("cosine", "l1", "l2")
TARGETS = ("online", "frozen", "ema")
NEGATIVES = ("all", "bank", "batch")
SIGMOID_START = math.log(10.0), -10.0  # t and bias (Zhai et al. 2023)


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    """Which loss, and against what.

    negatives : ``all`` known answers encoded at every step, or taken from a ``bank`` without gradient that is
    encoded again every ``bank_every`` steps, or only those of the ``batch``.
    """

    loss: str = "nce"
    target: str = "online"
    negatives: str = "all"
    bank_every: int = 100
    uniformity: float = 0.0  # weight of the uniformity of predictions and targets
    prior_correct: bool = False  # nce: learn how much likelier than usual an answer is, not how likely
    tau: float = 0.996  # of the average at the start; it rises to 1
    steps: int = 1  # over which it does

    def __post_init__(self):
        for name, known in (("loss", LOSSES), ("target", TARGETS), ("negatives", NEGATIVES)):
            value = getattr(self, name)
            require(value in known, f"{name} is {value!r}; expected one of {', '.join(known)}")
        require(self.bank_every >= 1 and self.steps >= 1, "bank_every and steps are at least 1")
        require(0 <= self.tau <= 1, f"tau is {self.tau}; expected a number in [0, 1]")
        require(self.uniformity >= 0, f"uniformity is {self.uniformity}; expected 0 or more")
        require(not self.prior_correct or self.loss == "nce", f"prior_correct is for nce, not for {self.loss}")
        require(self.loss not in REGRESSIONS or self.target == "frozen" or self.uniformity > 0,
                f"loss {self.loss} with a Y-Encoder that learns collapses: every text would get one embedding. Use "
                "target frozen, uniformity > 0, or vicreg")

    @property
    def contrastive(self):
        """Whether other answers repel a prediction."""
        return self.loss in ("nce", "paired", "sigmoid")


class Objective(nn.Module):
    """See the module's text; what it remembers between steps is its state, and so part of a checkpoint.

    model : VLJEPA, whose Y-Encoder is copied for ``ema``.   answers : those of the training rows, repeated as
    often as they come, for the prior.   ranks : those that share the encoding of the texts.
    """

    def __init__(self, config, model, answers=(), ranks=ALONE):
        self._ranks = ranks
        self.config, self._known = config, model.config.answers
        self._place = {text: i for i, text in enumerate(self._known)}
        counts = Counter(answers)
        self._total, self._counts = sum(counts.values()) + len(counts), counts
        self.register_buffer("updates", np.zeros((), np.int64))
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(np.array(SIGMOID_START[1], np.float32))
        if config.target == "ema":
            self.average = TextEncoder(model.config.text, rng=np.random.default_rng(0))
            self.average.load_state_dict(model.y_encoder.state_dict())
            self.average.requires_grad_(False)
        if self._banked:
            self.register_buffer("bank", self._encode_bank(model))

    @property
    def _banked(self):
        return self.config.contrastive and self.config.negatives == "bank" and self.config.loss != "paired"

    # ------------------------------------------------------------------ targets
    def _encoder(self, model):
        return self.average if self.config.target == "ema" else model.y_encoder

    @no_grad()
    def _encode_bank(self, model):
        rows = [self._encoder(model).encode(self._known[i : i + 256]).data for i in range(0, len(self._known), 256)]
        return np.concatenate(rows) if rows else np.zeros((0, model.config.text.embed_dim), np.float32)

    def _texts(self, answers):
        """(texts to encode, further known ones whose embeddings the bank holds)."""
        texts = set(answers)
        if self.config.contrastive and self.config.loss != "paired" and self.config.negatives == "all":
            texts.update(self._known)
        return sorted(texts), [text for text in self._known if text not in texts] if self._banked else []

    def _targets(self, encoder, texts, further, learn):
        """(n, E) embeddings of both lists, on the tape where the encoder is to learn."""
        encode = shared(encoder.encode, self._ranks)
        if learn:
            encoded = encode(texts)
        else:
            with no_grad():
                encoded = Tensor(encode(texts).data)
        if not further:
            return encoded
        return ops.concatenate(encoded, Tensor(self.bank[[self._place[text] for text in further]]), axis=0)

    # ------------------------------------------------------------------ the loss
    def forward(self, model, embedding, answers):
        """Predictions (B, E) and their B answers → (loss, metrics).

        metrics : "hits" (B,) bool, the right target was nearest of all at hand; for nce "excess", the loss
        without the part that no model can avoid.
        """
        texts, further = self._texts(answers)
        place = {text: i for i, text in enumerate([*texts, *further])}
        index = np.array([place[text] for text in answers])
        learns = model.y_encoder.projection.weight.requires_grad
        targets = self._targets(self._encoder(model), texts, further, learns and self.config.target == "online")
        loss = self._distance(model, embedding, targets, index, list(place))
        if self.config.target == "ema" and learns:
            online = self._targets(model.y_encoder, texts, further, True)
            loss = (loss + self._distance(model, Tensor(embedding.data), online, index, list(place))) * 0.5
        metrics = {"hits": (embedding.data @ targets.data.T).argmax(axis=1) == index}
        if self.config.loss == "nce":
            counts = np.bincount(index)
            metrics["excess"] = loss.item() - 0.5 * float(np.mean(np.log(counts[counts > 0])))
        return loss, metrics

    def _distance(self, model, p, q, index, texts):
        kind, width = self.config.loss, p.shape[1]
        if kind == "nce":
            loss = ops.multi_positive_info_nce(p, q, index, model.log_scale, log_prior=self._log_prior(texts))
        elif kind == "sigmoid":
            loss = ops.sigmoid_contrastive_loss(p, q, index, model.log_scale, self.bias)
        elif kind == "paired":
            loss = ops.info_nce(p, q[index], model.log_scale)
        elif kind == "vicreg":
            loss = ops.vicreg_loss(p * math.sqrt(width), q[index] * math.sqrt(width))
        elif kind == "cosine":
            loss = ops.cosine_loss(p, q[index])
        else:
            loss = (ops.l1_loss if kind == "l1" else ops.mse_loss)(p, q[index]) * float(width)  # a sum over E
        if self.config.uniformity:
            spread = ops.uniformity_loss(p, index) + ops.uniformity_loss(q)
            loss = loss + spread * (0.5 * self.config.uniformity)
        return loss

    def _log_prior(self, texts):
        """Logarithms of how often each text answers; once more than counted, so that none is impossible."""
        if not self.config.prior_correct:
            return None
        return np.log([(self._counts[text] + 1) / max(self._total, 1) for text in texts])

    # ------------------------------------------------------------------ between steps
    def after_step(self, model):
        """Move the average, and encode the bank again when its time has come."""
        if self.config.target == "ema":
            progress = min(1.0, float(self.updates) / self.config.steps)
            share = np.float32((1 - self.config.tau) * (1 - progress))
            for (name, slow), fast in zip(self.average.named_parameters(), model.y_encoder.parameters()):
                slow.data += share * (fast.data - slow.data)
                versions.changed(slow.data, name)
        self.updates += 1
        if self._banked and self.updates % self.config.bank_every == 0:
            self.bank[...] = self._encode_bank(model)


class Training(nn.Module):
    """What phase 1 trains, and what its checkpoints hold: the model, and the objective's own state."""

    def __init__(self, model, objective):
        self.model, self.objective = model, objective

    def after_step(self):
        """To be called after each optimizer step."""
        self.model.clamp_scale()
        self.objective.after_step(self.model)
