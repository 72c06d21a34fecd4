"""Phase 2: the Y-Decoder learns to put embeddings into words; everything else is frozen.

It is fed what it will meet: a mixture of the target's embedding and the predictor's, with a little noise,

    s̃ = norm(λ s_Y + (1 - λ) ŝ_Y + σ ε),    λ ~ U(0, 1),

because at inference it sees predictions, not targets.  Answers are words of a closed set; captions are texts
that it has to compose.  A decoder that looks sees the pictures of the captions, and those of the answers in every
other batch: a stream's embedding comes without one.
"""

import numpy as np

from training import caption_metrics
from training.parallel import ALONE
from training.phases.common import RowBatches, generator, rows_at_once
from training.phases.jepa import Example, collate, said_by_tool, target
from xuracore import no_grad
from xuracore.config import require
from xuravljepa.tokenizer import PAD

SHORT = 25  # tokens of a caption in the first half of the lesson: BOS and about four words


@no_grad()
def predict(model, rows, features, batch_size=None, tool=False):
    """Predicted embeddings (n, E) float32 of rows; with ``tool``, after reading the tool's text."""
    parts, batch_size = [], batch_size or rows_at_once(model)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        told = [said_by_tool(row) if tool else None for row in chosen]
        batch = collate(model, [Example(row, target(row), text) for row, text in zip(chosen, told)], features)
        parts.append(model.predictor(batch["query"], batch["visual"], batch["tool"]).embedding.data)
    return np.concatenate(parts)


@no_grad()
def _encoded(model, texts, batch_size=256):
    starts = range(0, len(texts), batch_size)
    return np.concatenate([model.encode_answers(texts[i : i + batch_size]).data for i in starts])


@no_grad()
def sight(model, rows, features):
    """The Sight of the pictures of rows; None where the decoder cannot look."""
    return model.predictor.sight(features(rows)) if model.config.decoder.look_dim else None


class AnswerBatches:
    """{"answers", "captions"}, each {"embedding" (B, E), "tokens" (B, L) from BOS to EOS, "sight"} or None.

    A pure function of (seed, step).  Where there are both, captions are half a batch.  Rows whose predicted answer
    is wrong teach nothing about wording and are left out.   ranks : those that share each batch; this one gives its
    part of it, and "weight", by which its mean over tokens counts in the mean over the ranks.   features : a
    FeatureStore over the rows, for a decoder that looks.   lesson : batches in which captions are cut short, so that
    the decoder first learns to begin: what comes first is the hardest to find, and the cheapest to practise.
    """

    def __init__(self, model, rows, predicted, batch_size, seed=0, noise=0.05, ranks=ALONE, features=None, lesson=0):
        texts = sorted({target(row) for row in rows})
        self._place = {text: i for i, text in enumerate(texts)}
        self._targets = _encoded(model, texts)
        answers = [i for i, row in enumerate(rows) if row.answer is not None]
        captions = [i for i, row in enumerate(rows) if row.answer is None]
        known = np.array(sorted({self._place[rows[i].answer] for i in answers}), int)
        right = [i for i in answers
                 if known[(self._targets[known] @ predicted[i]).argmax()] == self._place[rows[i].answer]]
        self._predicted, self._rows, self._noise, self._seed = predicted, rows, noise, seed
        self._tokens, self._ranks, self._model, self._features = model.y_decoder.tokens, ranks, model, features
        self._lesson = lesson
        written = batch_size // 2 if right else batch_size
        self._captions = RowBatches(captions, written, seed + 1) if captions else None
        answered = batch_size - written if captions else batch_size
        self._answers = RowBatches(right, answered, seed) if right or not captions else None
        least = min(part.batch_size for part in (self._answers, self._captions) if part)
        require(least >= ranks.size, f"a batch of {batch_size} has {least} of a kind, too few for {ranks.size} ranks")

    def __len__(self):
        return len(self._answers or self._captions)

    def batch(self, step):
        rng = generator(self._seed, 2, step)
        return {name: part and self._mixed(part.rows_of(step), rng, looking, length)
                for name, part, looking, length in (("answers", self._answers, step % 2, None),
                                                    ("captions", self._captions, True, self._length(step)))}

    def _length(self, step):
        """Tokens of a caption at most: few for half of the lesson, then ever more; None after it."""
        if step >= self._lesson:
            return None
        limit, share = self._model.config.decoder.max_length, max(0.0, 2 * step / self._lesson - 1)
        return min(limit, SHORT) + round(share * max(0, limit - SHORT))

    def _mixed(self, chosen, rng, looking, length):
        texts = [target(self._rows[i]) for i in chosen]
        predicted = self._predicted[chosen]
        meant = self._targets[[self._place[text] for text in texts]]
        share = rng.random((len(chosen), 1))
        noise = rng.standard_normal(predicted.shape) * (self._noise / np.sqrt(predicted.shape[1]))
        mixed = share * meant + (1 - share) * predicted + noise
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        own, tokens = self._ranks.part(len(chosen)), self._tokens(texts)[:, :length]
        foretold = np.count_nonzero(tokens[:, 1:] != PAD, axis=1)
        weight = self._ranks.size * foretold[own].sum() / foretold.sum()
        rows = [self._rows[i] for i in np.asarray(chosen)[own]]
        seen = sight(self._model, rows, self._features) if looking and self._features is not None else None
        return {"embedding": mixed[own].astype(np.float32), "tokens": tokens[own], "weight": float(weight),
                "sight": seen}


def loss_function(model, batch, rng=None, label_smoothing=0.0):
    """(cross-entropy per token, summed over answers and captions, {"perplexity", "caption_perplexity"})."""
    total, metrics = 0.0, {}
    for name, part in batch.items():
        if part is not None:
            loss = model.y_decoder.loss(part["embedding"], part["tokens"], label_smoothing, part["sight"])
            loss = loss * part["weight"]
            metrics["perplexity" if name == "answers" else "caption_perplexity"] = float(np.exp(min(loss.item(), 20.0)))
            total = loss + total
    return total, metrics


def write(model, rows, predicted, features=None, batch_size=64):
    """What the decoder writes to rows: texts, from embeddings (n, E) and, with ``features``, their pictures."""
    said = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        seen = None if features is None else sight(model, rows[part], features)
        said += model.y_decoder.write(predicted[part], sight=seen)
    return said


def exact_match(model, rows, predicted, constrained=False):
    """Share of rows whose decoded text equals the answer; ``constrained`` to the known answers, by their trie."""
    if constrained:
        allowed = list(model.config.answers)
        said = [model.y_decoder.generate(p, allowed=allowed)[0] for p in predicted]
    else:
        said = write(model, rows, predicted)
    return float(np.mean([text == row.answer for text, row in zip(said, rows)]))


def caption_report(model, rows, predicted, features=None):
    """How well the captions of rows are written: {type: {"exact", …}} with "bleu4" and "cider" for sentences.

    features : a FeatureStore over the rows, for a decoder that looks; None: from the embeddings alone.

    For types that name objects also "objects_exact", "precision" and "recall" (training/caption_metrics.py), and
    "cycle": the mean cosine of what was written, read again by the Y-Encoder, with the prediction.
    """
    said, report = write(model, rows, predicted, features), {}
    limit = model.config.text.max_length - 1
    readable = [text.encode()[:limit].decode(errors="ignore") for text in said]
    cycle = (_encoded(model, readable) * predicted).sum(axis=1)
    for kind in sorted({row.type or "caption" for row in rows}):
        chosen = [i for i, row in enumerate(rows) if (row.type or "caption") == kind]
        texts, truth = [said[i] for i in chosen], [rows[i].caption for i in chosen]
        words = [caption_metrics.words(text) for text in texts], [[caption_metrics.words(text)] for text in truth]
        report[kind] = {**caption_metrics.object_scores(texts, truth), "bleu4": caption_metrics.bleu4(*words),
                        "cider": caption_metrics.cider(*words), "cycle": float(cycle[chosen].mean())}
    return report
