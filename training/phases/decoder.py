"""Phase 2: the Y-Decoder learns to put embeddings into words; everything else is frozen.

It is fed what it will meet: a mixture of the target's embedding and the predictor's, with a little noise,

    s̃ = norm(λ s_Y + (1 - λ) ŝ_Y + σ ε),    λ ~ U(0, 1),

because at inference it sees predictions, not targets.
"""

import numpy as np

from training.parallel import ALONE
from training.phases.common import RowBatches, generator
from training.phases.jepa import Example, collate
from xuracore import no_grad
from xuravljepa.tokenizer import BOS, EOS, PAD, ByteTokenizer, pad_rows


@no_grad()
def predict(model, rows, features, batch_size=256, tool=False):
    """Predicted embeddings (n, E) float32 of rows; with ``tool``, after reading the tool's text."""
    parts = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        told = [str(row.tool["result"]) if tool and row.tool else None for row in chosen]
        batch = collate(model, [Example(row, row.answer, text) for row, text in zip(chosen, told)], features)
        parts.append(model.predictor(batch["query"], batch["visual"], batch["tool"]).embedding.data)
    return np.concatenate(parts)


class AnswerBatches:
    """{"embedding" (B, E), "tokens" (B, L) from BOS to EOS}, a pure function of (seed, step).

    rows whose predicted answer is wrong teach nothing about wording and are left out.   ranks : those that share
    each batch; this one gives its part of it.
    """

    def __init__(self, model, rows, predicted, batch_size, seed=0, noise=0.05, ranks=ALONE):
        unique = sorted({row.answer for row in rows})
        with no_grad():
            targets = model.encode_answers(unique).data
        place = {text: i for i, text in enumerate(unique)}
        nearest = (predicted @ targets.T).argmax(axis=1)
        kept = [i for i, row in enumerate(rows) if nearest[i] == place[row.answer]]
        self._predicted, self._targets, self._place = predicted, targets, place
        self._rows, self._noise, self._seed = rows, noise, seed
        self._batches, self._part = RowBatches(kept, batch_size, seed), ranks.part(batch_size)

    def __len__(self):
        return len(self._batches)

    def batch(self, step):
        rng = generator(self._seed, 2, step)
        chosen = self._batches.rows_of(step)
        answers = [self._rows[i].answer for i in chosen]
        predicted = self._predicted[chosen]
        target = self._targets[[self._place[text] for text in answers]]
        share = rng.random((len(chosen), 1))
        noise = rng.standard_normal(predicted.shape) * (self._noise / np.sqrt(predicted.shape[1]))
        mixed = share * target + (1 - share) * predicted + noise
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        return {"embedding": mixed[self._part].astype(np.float32), "tokens": answer_tokens(answers[self._part])}


def answer_tokens(answers):
    """(B, L) ids, BOS … EOS, padded with PAD."""
    tokenizer = ByteTokenizer()
    return pad_rows([[BOS, *tokenizer.encode(text), EOS] for text in answers])


def token_count(batch):
    """How many tokens of a batch are to be foretold: what the loss is a mean over."""
    return float(np.count_nonzero(batch["tokens"][:, 1:] != PAD))


def loss_function(model, batch, rng=None, label_smoothing=0.0):
    """(cross-entropy per token, {"perplexity"})."""
    loss = model.y_decoder.loss(batch["embedding"], batch["tokens"], label_smoothing)
    return loss, {"perplexity": float(np.exp(min(loss.item(), 20.0)))}


def exact_match(model, rows, predicted, constrained=False):
    """Share of rows whose decoded text equals the answer."""
    allowed = list(model.config.answers) if constrained else None
    hits = [model.y_decoder.generate(p, allowed=allowed)[0] == row.answer for row, p in zip(rows, predicted)]
    return float(np.mean(hits))
