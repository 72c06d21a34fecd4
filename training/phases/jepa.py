"""Phase 1: predictor, Y-Encoder and gates learn to predict the answer's embedding; the X-Encoder is frozen.

The loss is InfoNCE with unique targets and several positives (equal answers are one target), plus a
small pull of the gates towards open.  Rows of tool questions teach two things: prices and sums of *known*
keys by heart, and, where the result of a tool stands in the sequence, to read it and say what it says.
"""

from dataclasses import dataclass

import numpy as np

from training.phases.common import RowBatches, generator
from xuravljepa.model import contrastive_loss
from xuravljepa.tokenizer import PAD


@dataclass(frozen=True)
class Example:
    """One question as the model will see it; ``tool`` is the text of a result, or None."""

    row: object
    answer: str
    tool: str | None


class QuestionBatches:
    """Batches for phase 1, a pure function of (seed, step).

    rows : Samples of the data set.   features : a FeatureStore over them, or None to give pixels.
    told : share of the known tool rows that get the tool's text all the same.
    rumour : share of the texts in which the tool says another number than the list: its word counts.
    """

    def __init__(self, model, rows, features, batch_size, seed=0, told=0.3, rumour=0.5, numbers=31):
        self._model, self._features = model, features
        self._batches = RowBatches([row for row in rows if row.answer is not None and row.query], batch_size, seed)
        self._seed, self._told, self._rumour, self._numbers = seed, told, rumour, numbers

    def __len__(self):
        return len(self._batches)

    def _example(self, row, rng):
        if row.tool is None:
            return Example(row, row.answer, None)
        known = row.meta.get("known", False)
        if known and rng.random() >= self._told:
            return Example(row, row.answer, None)
        if row.answer.isdigit() and rng.random() < self._rumour:
            said = str(rng.integers(self._numbers))
            return Example(row, said, said)
        return Example(row, row.answer, str(row.tool["result"]))

    def batch(self, step):
        """{"query", "visual", "tool" (ids or None), "answers", "types"}."""
        rng = generator(self._seed, 1, step)
        examples = [self._example(row, rng) for row in self._batches.rows_of(step)]
        return collate(self._model, examples, self._features)


def collate(model, examples, features):
    """Examples → arrays for the predictor; rows without a tool's text have PAD there."""
    tool = None
    told = [i for i, example in enumerate(examples) if example.tool is not None]
    if told:
        ids = model.tool_tokens([examples[i].tool for i in told])
        tool = np.full((len(examples), ids.shape[1]), PAD, np.int64)
        tool[told] = ids
    return {
        "query": model.query_tokens([example.row.query for example in examples]),
        "visual": features([example.row for example in examples]),
        "tool": tool,
        "answers": [example.answer for example in examples],
        "types": [example.row.type for example in examples],
    }


def loss_function(model, batch, rng=None, gate_weight=0.01):
    """(loss, {"accuracy", "gate", "scale"}); accuracy is over the distinct answers of the batch."""
    reading = model.predictor(batch["query"], batch["visual"], batch["tool"])
    loss, hits = contrastive_loss(model, reading.embedding, batch["answers"])
    metrics = {"accuracy": float(np.mean(hits)), "scale": model.scale, "nce": loss.item()}
    if model.config.predictor.gates:
        penalty = sum((layer.gate.regulariser() for layer in model.predictor.layers), start=0.0)
        loss = loss + penalty * (gate_weight / len(model.predictor.layers))
        metrics["gate"] = float(np.mean(model.predictor.gate_activation()))
    return loss, metrics
