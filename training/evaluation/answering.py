"""What every job shares: reading rows with the model, judging what it says, and intervals by picture."""

import zlib
from dataclasses import dataclass, replace

import numpy as np

from training import metrics
from training.phases.common import generator, image_key
from training.phases.jepa import Example, collate
from xuracore import no_grad

KIND = {True: "relational", False: "non-relational"}
VQA_ANNOTATORS = 10  # with so many answers to a question, a text that three people gave is right (VQAv2)


@dataclass(frozen=True)
class Answers:
    """What a model said to rows.

    said (n,) texts.   right (n,) in [0, 1].   confidence (n,): the greatest probability of the answers' softmax.
    embedding (n, E).   pictures (n,): numbers of the pictures asked about.
    """

    rows: tuple
    said: np.ndarray
    right: np.ndarray
    confidence: np.ndarray
    embedding: np.ndarray
    pictures: np.ndarray


def score(said, row):
    """How right an answer is: 1 or 0; among ten people's answers min(n / 3, 1) for n who gave it (VQAv2)."""
    given = [plain(text) for text in row.answers].count(plain(said))
    return min(given / 3, 1.0) if len(row.answers) >= VQA_ANNOTATORS else float(given > 0)


def plain(text):
    """The text without what no answer hangs on: capitals and further spaces."""
    return " ".join(text.casefold().split())


def picture_numbers(rows):
    """(n,) the number of each row's picture, in order of appearance."""
    places = {}
    return np.array([places.setdefault(image_key(row), len(places)) for row in rows], np.int64)


@no_grad()
def encode_texts(model, texts, batch_size=256):
    """(n, E) array: the Y-Encoder's embeddings of texts, a part at a time; their number may be large."""
    parts = [model.encode_answers(texts[i : i + batch_size]).data for i in range(0, len(texts), batch_size)]
    return np.concatenate(parts)


@no_grad()
def read(model, rows, features, shown=None, candidates=None, report=None, batch_size=128):
    """Ask the model every row; an Answers.

    features : FeatureStore over the rows' pictures.   shown : rows whose pictures are shown instead.
    candidates : texts to choose from instead of the model's known answers; a row's own ``choices`` win over both.
    report : called with (done, total).
    """
    names = list(model.config.answers if candidates is None else candidates)  # none: only the embeddings count
    bank = encode_texts(model, names) if names else None
    chosen_from = sorted({text for row in rows for text in row.choices})
    place = {text: i for i, text in enumerate(chosen_from)}
    choices = encode_texts(model, chosen_from) if chosen_from else None
    said, sure, embeddings, scale = [], [], [], model.scale
    for start in range(0, len(rows), batch_size):
        asked = rows[start : start + batch_size]
        seen = asked if shown is None else shown[start : start + batch_size]
        batch = collate(model, [Example(row, row.answer, None) for row in asked], None)
        embedding = model.predictor(batch["query"], features(seen)).embedding.data
        embeddings.append(embedding)
        cosines = embedding @ bank.T if names else np.zeros((len(asked), 0), np.float32)
        for i, row in enumerate(asked):
            own, texts = cosines[i], names
            if row.choices:
                texts = row.choices
                own = choices[[place[text] for text in texts]] @ embedding[i]
            if not texts:
                said.append(""), sure.append(0.0)
                continue
            best = int(own.argmax())
            said.append(texts[best])
            logits = (own.astype(np.float64) - own[best]) * scale
            sure.append(1 / np.exp(logits).sum())
        if report is not None:
            report(start + len(asked), len(rows))
    right = np.array([score(text, row) for text, row in zip(said, rows)])
    return Answers(tuple(rows), np.array(said), right, np.array(sure), np.concatenate(embeddings),
                   picture_numbers(rows))


def answers_of(model, rows, features, visual_of=None):
    """The model's answers (n,) to rows; ``visual_of`` (n,) indices shows other rows' pictures instead."""
    shown = None if visual_of is None else [rows[i] for i in visual_of]
    return read(model, rows, features, shown).said


def other_pictures(rows, seed=0):
    """For each row a row about another picture: all questions about one picture move to the same other one.

    Pictures are taken in a random order, each showing the next, so that none shows itself (unless it is alone).
    """
    first = {}
    for row in rows:
        first.setdefault(image_key(row), row)
    keys = list(first)
    order = generator(seed, 21).permutation(len(keys))
    following = {keys[a]: first[keys[b]] for a, b in zip(order, np.roll(order, -1))}
    return [following[image_key(row)] for row in rows]


def ask_each(rows, query, keep=False):
    """One row per picture, the first, with ``query`` as its question and no choices.

    keep : leave a row's own question where it has one.
    """
    first = {}
    for row in rows:
        first.setdefault(image_key(row), row)
    return [replace(row, query=row.query if keep and row.query else query, choices=()) for row in first.values()]


def groups_of(row):
    """The names under which a row counts: all, relational or not where that is known, and its type."""
    relational = row.meta.get("relational")
    return ("all", *([KIND[relational]] if isinstance(relational, bool) else []), row.type or "untyped")


def by_type(rows, right):
    """{group: (accuracy, count)}; see ``groups_of``."""
    found = {}
    for row, hit in zip(rows, right):
        for name in groups_of(row):
            found.setdefault(name, []).append(hit)
    return {name: (float(np.mean(hits)), len(hits)) for name, hits in sorted(found.items())}


@dataclass(frozen=True)
class Intervals:
    """Bootstrap settings: the same cell gets the same interval whatever else is measured, in whatever order."""

    seed: int = 0
    resamples: int = 1000

    def rng(self, name):
        """A Generator of the name's own."""
        return generator(self.seed, 22, zlib.crc32(name.encode()))

    def cell(self, name, value, pictures):
        """{"value", "low", "high", "count", "pictures"} of the mean of ``value`` (n,), by picture."""
        low, high = metrics.mean_interval(value, self.rng(name), pictures, self.resamples)
        return {"value": float(np.mean(value)), "low": low, "high": high, "count": len(value),
                "pictures": len(np.unique(pictures))}

    def jackknife(self, statistic, count, pictures=None):
        """The cell of ``statistic(indices)`` over ``count`` rows, its interval from leaving out tenths of pictures.

        pictures (count,): whose rows are left out together.  Without them, or with fewer than 20, no interval.
        """
        every = np.arange(count)
        cell = {"value": float(statistic(every)), "count": count}
        kinds = [] if pictures is None else np.unique(pictures)
        if len(kinds) >= 20:  # fewer leave tenths of a picture or two
            tenth = self.rng("jackknife").permutation(np.arange(len(kinds)) % 10)
            part = tenth[np.searchsorted(kinds, pictures)]
            low, high = metrics.jackknife_interval(statistic, [np.flatnonzero(part == i) for i in range(10)], every)
            cell.update(low=low, high=high, pictures=len(kinds))
        return cell

    def by_type(self, column, rows, value, pictures):
        """{group: cell} over the groups of the rows."""
        members = {}
        for i, row in enumerate(rows):
            for name in groups_of(row):
                members.setdefault(name, []).append(i)
        value = np.asarray(value, dtype=np.float64)
        return {name: self.cell(f"{column}/{name}", value[found], pictures[found])
                for name, found in sorted(members.items())}
