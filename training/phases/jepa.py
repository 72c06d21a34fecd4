"""Phase 1: predictor, Y-Encoder and gates learn to predict the answer's embedding; the X-Encoder is frozen.

The loss is one of training/phases/objective.py, plus a small pull of the gates towards open.  Rows of tool
questions teach two things: prices and sums of *known* keys by heart, and, where the result of a tool stands in
the sequence, to read it and say what it says.

A picture is expensive to read and cheap to ask about, so each sequence holds several turns: after the first
answer, further questions are read from the state that is there,

    [q1] [visual] ([TOOL]) [q1] [READ]   [q2] [READ]   [q3] [READ] …
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from training.accumulate import TwoPass
from training.parallel import ALONE
from training.phases.common import RowBatches, generator, image_key
from xuracore import ops
from xuravljepa.model import CAPTION_QUERY
from xuravljepa.tokenizer import PAD

_SMALL_WORDS = ("the", "a", "an", "is", "of", "one", "there", "are", "do", "you", "to", "what")
LESSON_TYPES = ("shape", "size", "horizontal", "vertical")


@dataclass(frozen=True)
class Example:
    """One question as the model will see it; ``tool`` is the text of a result, or None."""

    row: object
    answer: str
    tool: str | None
    query: str | None = None  # in place of the row's


class QuestionBatches:
    """Batches for phase 1, a pure function of (seed, step).

    rows : Samples of the data set.   features : a FeatureStore over them.   turns : questions per picture
    (fewer where pictures have fewer).   tool_share : share of the sequences whose first question is a tool
    question.   told : share of the known tool rows that get the tool's text all the same.   rumour : share of
    the texts in which the tool says another number than the list: its word counts.   captions : share of the
    questions that are replaced by one answered by a caption, where the picture has captions.   typos : share of
    the questions with one slip of the pen.   ranks : those that share each batch; this one gives its part of it.
    """

    def __init__(self, model, rows, features, batch_size, seed=0, turns=4, lesson=0, tool_share=0.3, told=0.3,
                 rumour=0.5, numbers=31, captions=0.125, typos=0.0, ranks=ALONE):
        self._model, self._features, self._seed = model, features, seed
        self._tool_share, self._told, self._rumour, self._numbers = tool_share, told, rumour, numbers
        self._caption_share, self._typos, self._part = captions, typos, ranks.part(batch_size)
        plain, self._tools, self._captions, self._lesson = {}, {}, {}, lesson
        for row in rows:
            if row.query and row.answer is not None:
                kind = plain if said_by_tool(row) is None else self._tools
            elif row.caption is not None:
                kind = self._captions
            else:
                continue
            kind.setdefault(image_key(row), []).append(row)
        self._plain = plain
        counts = sorted(len(found) for found in plain.values())
        self.turns = min(turns, counts[len(counts) // 2]) if counts else 1
        self._batches = RowBatches(list(dict.fromkeys([*plain, *self._tools, *self._captions])), batch_size, seed)

    def __len__(self):
        return len(self._batches)

    def _example(self, row, rng):
        example = self._heard(row, rng)
        if self._typos and rng.random() < self._typos:
            return replace(example, query=misspelt(row.query or CAPTION_QUERY, rng, row.meta.get("key")))
        return example

    def _heard(self, row, rng):
        text = said_by_tool(row)
        if text is None:
            return Example(row, target(row), None)
        if row.meta.get("known", False) and rng.random() >= self._told:
            return Example(row, row.answer, None)
        if row.answer.isdigit() and rng.random() < self._rumour:
            said = str(rng.integers(self._numbers))
            return Example(row, said, said)
        return Example(row, row.answer, text)

    def _rows(self, picture, rng, lesson):
        """``turns`` different questions about a picture, a tool question first where one is drawn."""
        plain, tools = self._plain.get(picture, []), self._tools.get(picture, [])
        easy = [row for row in plain if row.type in LESSON_TYPES] if lesson else []
        if easy:
            plain, tools = easy, []
        first = [tools[rng.integers(len(tools))]] if tools and (not plain or rng.random() < self._tool_share) else []
        texts = self._captions.get(picture)
        if not plain:
            return [first[0]] * self.turns if first else [texts[i % len(texts)] for i in range(self.turns)]
        order = rng.permutation(len(plain))
        rows = (first + [plain[order[i % len(plain)]] for i in range(self.turns)])[: self.turns]
        if not texts or easy:
            return rows
        return [texts[rng.integers(len(texts))] if row.tool is None and rng.random() < self._caption_share else row
                for row in rows]

    def batch(self, step):
        """{"turns", "answers", "texts"}: turns as ``collate`` gives them, only the first with "visual" and "tool".

        answers : those of all turns, in their order.   texts : (n,) indices of those that are captions.
        """
        rng = generator(self._seed, 1, step)
        by_picture = [self._rows(picture, rng, step < self._lesson) for picture in self._batches.rows_of(step)]
        examples = [[self._example(rows[turn], rng) for rows in by_picture][self._part] for turn in range(self.turns)]
        first = collate(self._model, examples[0], self._features)
        later = [collate(self._model, some, None) for some in examples[1:]]
        texts = [rows[turn].answer is None for turn in range(self.turns) for rows in by_picture[self._part]]
        return {"answers": [text for turn in (first, *later) for text in turn["answers"]], "turns": [first, *later],
                "texts": np.flatnonzero(texts)}


def target(row):
    """What a row teaches to say: its answer or, where it has none, its caption."""
    return row.caption if row.answer is None else row.answer


def said_by_tool(row):
    """What a row's tool says, as the agent hands it on; None where there is no tool, or no result of it is known."""
    result = row.tool.get("result") if row.tool else None
    return None if result is None else str(result).strip().lower() or None


def misspelt(query, rng, key=None):
    """``query`` as a hasty hand puts it: a letter missing, doubled, swapped or wrong, or a small word left out.

    key : a word that stays as it is.
    """
    words = query.split(" ")
    small = [i for i, word in enumerate(words) if word in _SMALL_WORDS]
    long = [i for i, word in enumerate(words) if len(word) >= 4 and word.isalpha() and word != key]
    if small and len(words) > 2 and (not long or rng.random() < 0.3):
        del words[small[rng.integers(len(small))]]
    elif long:
        i = long[rng.integers(len(long))]
        word, at = words[i], int(rng.integers(1, len(words[i]) - 1))
        start, letter, rest = word[:at], word[at], word[at + 1 :]
        other = chr(ord("a") + int(rng.integers(26)))
        words[i] = start + (rest, letter + letter + rest, rest[0] + letter + rest[1:], other + rest)[rng.integers(4)]
    return " ".join(words)


def collate(model, examples, features):
    """Examples → arrays for the predictor; rows without a tool's text have PAD there.

    features : None where the pictures were seen in an earlier turn.
    """
    tool = None
    told = [i for i, example in enumerate(examples) if example.tool is not None]
    if told:
        ids = model.tool_tokens([examples[i].tool for i in told])
        tool = np.full((len(examples), *ids.shape[1:]), PAD, np.int64)
        tool[told] = ids
    return {
        "query": model.query_tokens([example.query or example.row.query or CAPTION_QUERY for example in examples]),
        "visual": None if features is None else features([example.row for example in examples]),
        "tool": tool,
        "answers": [example.answer for example in examples],
    }


def features(training, batch, rng=None):
    """(predicted embeddings,): one row per answer of the batch, in their order."""
    predictor, (first, *later) = training.model.predictor, batch["turns"]
    reading = predictor(first["query"], first["visual"], first["tool"])
    predicted = [reading.embedding]
    for turn in later:
        reading = predictor.read(turn["query"], reading.states)
        predicted.append(reading.embedding)
    return (ops.concatenate(*predicted, axis=0) if later else predicted[0],)


def joint(training, predicted, batches, gate_weight=0.01):
    """(loss, metrics) of the predictions of all ``batches``, each the others' negatives.

    metrics : "accuracy" over all answers at hand, "first" of the first turns alone, "gate" of the last batch,
    "scale", and those of the Objective.
    """
    model, (embedding,) = training.model, predicted
    answers = [text for batch in batches for text in batch["answers"]]
    loss, found = training.objective(model, embedding, answers)
    hits = found.pop("hits")
    first = np.concatenate([np.arange(len(batch["answers"])) < len(batch["turns"][0]["answers"]) for batch in batches])
    metrics = {"accuracy": float(np.mean(hits)), "first": float(np.mean(hits[first])), "scale": model.scale, **found}
    gate = model.predictor.gate_activation()
    if gate is not None:
        penalty = sum((layer.gate.regulariser() for layer in model.predictor.layers), start=0.0)
        loss = loss + penalty * (gate_weight / len(model.predictor.layers))
        metrics["gate"] = float(np.mean(gate))
    return loss, metrics


def words(training, predicted, batch, batches):
    """The part of (loss, {"words"}) that the captions of one of ``batches`` have: cross-entropy of their bytes.

    They are also to be written by the Y-Decoder, from the prediction: to tell a picture from those of a batch
    takes less than to describe it.
    """
    texts, decoder = _captions(batch), training.model.y_decoder
    if not texts:
        return None, {}
    whole = sum(len(text.encode()) + 1 for each in batches for text in _captions(each))  # each ends in EOS
    here = sum(len(text.encode()) + 1 for text in texts)
    loss = decoder.loss(predicted[0][np.asarray(batch["texts"])], decoder.tokens(texts)) * (here / whole)
    return loss, {"words": loss.item()}


def _captions(batch):
    return [batch["answers"][i] for i in batch["texts"]]


def share(batch):
    """What :func:`joint` and :func:`words` look at of a batch, as JSON data."""
    return {"answers": batch["answers"], "texts": batch["texts"].tolist(),
            "turns": [{"answers": batch["turns"][0]["answers"]}]}


def answer_loss(gate_weight=0.01):
    """The loss function of a Training for the Trainer; the batches of a step are compared with one another."""
    return TwoPass(features, functools.partial(joint, gate_weight=gate_weight), share, words)
