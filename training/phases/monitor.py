"""Phase 3, stage 2: the ConfusionMonitor learns from the model's own right and wrong answers.

To questions that nothing was trained on: ``calib`` scenes as they are and through each corruption, tool keys
known, kept apart and freshly made up (before and after the tool's result is taken in), what was seen earlier, and
pictures that are no
scenes.  The loss is a binary cross-entropy and, within each of these groups, a ranking of wrong before right:
a group that is hard as a whole must not teach that all of another group is easy.  What takes the place of these
groups where people bring their own questions is in ``training/phases/agent_own.py``.
"""

from dataclasses import dataclass, replace

import numpy as np

from training import metrics
from training.data.scenes import CORRUPTIONS
from training.data.strange import TAUGHT, changed, strange_image
from training.data.tools_data import KNOWN_SHOPS, MAX_COUNT, shop_names
from training.phases.common import generator, image_key, row_pixels
from training.phases.jepa import Example, collate, said_by_tool
from xuracore import no_grad, ops
from xuravljepa import image as images
from xuravljepa.agent.confusion import NUMBERS, monitor_features, views
from xuravljepa.agent.injector import Injection
from xuravljepa.feature_cache import picture_digest

SHARES = {"scenes": 6.0, "pictures": 6.0, **{name: 0.6 for name in CORRUPTIONS}, **{name: 0.4 for name in TAUGHT},
          "tools": 2.4, "memory": 0.8, "strange": 0.3}  # of a batch
CLEAR = ("scenes", "pictures")  # wrong answers are so rare there that their ranking counts more
CLEAR_WEIGHT, DROPOUT, WEIGHT_DECAY = 5.0, 0.5, 0.3
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class ViewStore:
    """Visual tokens of the pictures of rows and of their moved views, ``store(rows)`` → (B, views, n, d) float32.

    change : of the pixels (n, 3, S, S), as the model wants them, before anything looks at them.
    cache : a FeatureCache that keeps the tokens.
    """

    def __init__(self, model, shift, rows, batch_size=32, report=None, change=None, cache=None):
        self._places, pictures = {}, []
        for row in rows:
            if self._places.setdefault(image_key(row), len(pictures)) == len(pictures):
                pictures.append(row)
        vision, count = model.config.vision, 3 if shift else 1
        self.tokens = np.empty((len(pictures), count, vision.n_tokens, vision.d_model), np.float16)
        for start in range(0, len(pictures), batch_size):
            pixels = np.stack([row_pixels(model, row) for row in pictures[start : start + batch_size]])
            pixels = pixels if change is None else change(pixels)
            self.tokens[start : start + len(pixels)] = view_tokens(model, pixels, shift, cache)
            if report is not None:
                report(start + len(pixels), len(pictures))

    def __call__(self, rows):
        return self.tokens[[self._places[image_key(row)] for row in rows]].astype(np.float32)


def view_tokens(model, pixels, shift, cache=None):
    """pixels (B, 3, S, S) → visual tokens (B, views, n, d), those of a FeatureCache where they are there."""
    seen = views(pixels, shift)
    flat = seen.reshape(-1, *pixels.shape[1:])
    if cache is None:
        tokens = model.visual_tokens(flat)
    else:
        digests = [picture_digest(one) for one in flat]
        first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
        if missing := cache.missing(digests):
            cache.add(missing, model.visual_tokens(flat[[first[digest] for digest in missing]]))
        tokens = cache.tokens(digests)[:]
    return tokens.reshape(*seen.shape[:2], *tokens.shape[1:])


class Judge:
    """Reads questions about (B, views, n, d) visual tokens, and notes what the monitor looks at."""

    def __init__(self, model, heads):
        self.model, self.heads = model, heads

    def first(self, query, visual):
        """(features, cosines, [Injection of each view]) of a question read for the first time."""
        predictor = self.model.predictor
        seen = [Injection(predictor.look(query, visual[:, i])) for i in range(visual.shape[1])]
        return *self._read(query, visual, seen, 0), seen

    def again(self, query, visual, seen, texts):
        """(features, cosines) after tools said ``texts``."""
        knowledge = self.model.encode_answers(texts)
        told = [self.heads.injector.take_in(self.model.predictor, lambda: self.model.tool_tokens(texts), knowledge,
                                            one.states) for one in seen]
        return self._read(query, visual, told, 1)

    def _read(self, query, visual, seen, depth):
        layer = self.heads.config.injector.residual_layer
        cosines = []
        for number, injection in enumerate(seen):
            reading = injection.read(self.model.predictor, query, layer)
            cosines.append(self.model.similarities(reading.embedding))
            if not number:
                pooled, gate = reading.pooled.data, self.model.predictor.gate_activation()
                gate = np.full(len(query), 0.5) if gate is None else gate.mean(axis=0)
        features = monitor_features(pooled, cosines[0], self.model.scale, gate,
                                    self.heads.monitor.familiarity(visual[:, 0]), depth, seen[0].change, cosines[1:])
        return features, cosines[0]


@no_grad()
def gather_readings(model, heads, rows, features=None, batch_size=64, inject=True, report=None):
    """The model's readings of rows as monitor features and labels.

    Each row is read once; with ``inject``, tool rows are read again with the tool's result taken in.
    features : a ViewStore over the rows, or a FeatureStore, which shows no views; by default a ViewStore.
    Returns a dict of arrays: features (n, f), wrong (n,) 0/1, depth (n,), row (n,) index into rows, said (n,) index
    of the answer, and of the answers' softmax top (n,) the greatest probability, margin (n,) that less the next,
    entropy (n,) in [0, 1].
    """
    found = {"features": [], "wrong": [], "depth": [], "row": [], "said": [], "top": [], "margin": [], "entropy": []}
    features = ViewStore(model, heads.monitor.config.shift, rows) if features is None else features
    judge = Judge(model, heads)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        query = collate(model, [Example(row, row.answer, None) for row in chosen], None)["query"]
        visual = features(chosen)
        visual = visual[:, None] if visual.ndim == 3 else visual
        *first, seen = judge.first(query, visual)
        _note(found, model, *first, chosen, np.arange(start, start + len(chosen)), 0)
        told = np.array([i for i, row in enumerate(chosen) if inject and said_by_tool(row) is not None], np.int64)
        if len(told):
            before = [Injection([_take(state, told) for state in one.states]) for one in seen]
            again = judge.again(query[told], visual[told], before, [said_by_tool(chosen[i]) for i in told])
            _note(found, model, *again, [chosen[i] for i in told], told + start, 1)
        if report is not None:
            report(start + len(chosen), len(rows))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _take(state, rows):
    return type(state)(*(part[rows] for part in state))


def _note(found, model, features, cosines, rows, index, depth):
    answers = np.array(model.config.answers)
    said = cosines.argmax(axis=1)
    logits = cosines.astype(np.float64) * model.scale
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ranked = np.sort(p, axis=1)
    entropy = -(p * np.log(p + 1e-300)).sum(axis=1) / max(np.log(p.shape[1]), 1e-12)
    wrong = np.array([text not in (row.answer, *row.answers) for text, row in zip(answers[said], rows)])
    values = {"features": features, "wrong": wrong, "said": said,
              "depth": np.full(len(rows), depth), "row": index, "top": ranked[:, -1],
              "margin": ranked[:, -1] - (ranked[:, -2] if p.shape[1] > 1 else 0), "entropy": entropy.clip(0, 1)}
    for name, value in values.items():
        found[name].append(value.astype(np.int64) if name == "wrong" else value)


@no_grad()
def strange_readings(model, heads, rows, count, seed=0, batch_size=64):
    """Monitor features (count, f) of questions about pictures that are no scenes: every answer counts as wrong."""
    judge, parts = Judge(model, heads), []
    for start in range(0, count, batch_size):
        number = min(batch_size, count - start)
        pixels = np.stack([images.prepare(strange_image(start + i, seed), model.config.preprocessing)
                           for i in range(number)])
        query = model.query_tokens([rows[(start + i) % len(rows)].query for i in range(number)])
        parts.append(judge.first(query, view_tokens(model, pixels, heads.monitor.config.shift))[0])
    return np.concatenate(parts)


# ---------------------------------------------------------------------- questions nobody asked before
def corrupted(rows, kind):
    """The same questions about the same scenes seen through a corruption."""
    return [replace(row, image=replace(row.image, corruption=kind)) for row in rows]


def changes(kind, seed=0):
    """What a ViewStore does to its pictures, for one of ``TAUGHT``."""
    rng = generator(seed, 8, TAUGHT.index(kind))
    return lambda pixels: changed(pixels, kind, rng)


def with_new_keys(rows, seed=0):
    """Tool rows of unseen keys with keys that nobody thought of: made-up shops, other numbers to add to.

    A made-up shop has a random price.  No key belongs to the pool ``test``, nor is a known shop's name one letter
    away.
    """
    taken, result = {*shop_names("test", seed), *KNOWN_SHOPS}, []
    for number, row in enumerate(rows):
        rng, key = generator(seed, 6, number), row.meta["key"]
        if row.meta["known"]:
            result.append(row)
            continue
        if row.type == "price":
            new, answer = _new_shop(rng, taken), str(rng.integers(31))
        else:
            new = str(rng.choice([*range(6, 24, 2), *range(24, 100)]))
            count = int(row.answer) - int(key)
            answer = str(int(new) + min(count, MAX_COUNT))
        result.append(replace(row, query=row.query.replace(key, new), answer=answer, answers=(answer,),
                              tool={**row.tool, "result": answer}, meta={**row.meta, "key": new}))
    return result


def _new_shop(rng, taken):
    while True:
        letters = 5 if rng.random() < 0.7 else int(rng.integers(3, 9))
        start = int(rng.integers(2)) if letters != 5 else 0
        name = "".join((_CONSONANTS, _VOWELS)[(i + start) % 2][rng.integers(14 if (i + start) % 2 == 0 else 5)]
                       for i in range(letters))
        if name not in taken and all(len(known) != letters or sum(a != b for a, b in zip(name, known)) > 1
                                     for known in KNOWN_SHOPS):
            return name


# ---------------------------------------------------------------------- learning
@dataclass(frozen=True)
class Readings:
    """features (n, f), wrong (n,) 0/1, group (n,) names, picture (n,): number of the picture asked about."""

    features: np.ndarray
    wrong: np.ndarray
    group: np.ndarray
    picture: np.ndarray

    @classmethod
    def of(cls, found, rows, group, number=lambda row: row.image.index):
        """Of what ``gather_readings`` found.   number : of the picture of a row."""
        pictures = np.array([number(row) for row in rows])[found["row"]]
        return cls(found["features"], found["wrong"], np.full(len(pictures), group, object), pictures)

    @classmethod
    def joined(cls, parts):
        return cls(*(np.concatenate([getattr(part, name) for part in parts])
                     for name in ("features", "wrong", "group", "picture")))

    def __getitem__(self, rows):
        return Readings(self.features[rows], self.wrong[rows], self.group[rows], self.picture[rows])


class ReadingBatches:
    """{"features", "wrong", "group", "weight", "keep"}: readings drawn by the groups' shares.

    hidden : width of the monitor's network, of which ``keep`` leaves out the share ``DROPOUT``.  Batch i is a
    function of (seed, i) and the same for all ranks: pairs are compared across the whole of it.
    """

    def __init__(self, readings, batch_size, hidden, seed=0):
        self._readings, self._size, self._hidden, self._seed = readings, batch_size, hidden, seed
        names, self._group = np.unique(readings.group.astype(str), return_inverse=True)
        self._members = [np.flatnonzero(self._group == i) for i in range(len(names))]
        share = np.array([SHARES.get(name, 1.0) for name in names])
        self._share, self._clear = share / share.sum(), np.isin(names, CLEAR)

    def batch(self, step):
        rng = generator(self._seed, 5, step)
        kinds = rng.choice(len(self._share), self._size, p=self._share)
        rows = np.array([self._members[kind][rng.integers(len(self._members[kind]))] for kind in kinds])
        keep = (rng.random((self._size, self._hidden)) >= DROPOUT).astype(np.float32) / np.float32(1 - DROPOUT)
        return {"features": self._readings.features[rows], "wrong": self._readings.wrong[rows], "group": kinds,
                "keep": keep, "weight": np.where(self._clear[kinds], CLEAR_WEIGHT, 1.0).astype(np.float32)}


def monitor_objective(heads, batch, rng=None):
    """(binary cross-entropy + ranking within groups, {"accuracy", "ranked": share of pairs in order})."""
    logits = heads.monitor(batch["features"], batch["keep"])
    wrong, group = batch["wrong"] > 0, batch["group"]
    loss = ops.bce_with_logits(logits, wrong.astype(np.float32))
    numbers = {"accuracy": float(((logits.data > 0) == wrong).mean())}
    pairs = wrong[:, None] & ~wrong[None] & (group[:, None] == group[None])
    if pairs.any():
        ahead = logits.reshape(-1, 1) - logits.reshape(1, -1)
        weight = pairs * batch["weight"] / np.float32(pairs.sum())
        loss = loss + (ops.softplus(-ahead) * weight.astype(np.float32)).sum()
        numbers["ranked"] = float((ahead.data[pairs] > 0).mean())
    return loss, numbers


def held_back(readings):
    """(n,) bool: readings kept apart for the calibration; a picture belongs to one side only."""
    return readings.picture % 3 == 0


def judged(monitor, readings):
    """{group: {"auroc", "agreement"}} of the monitor, and of the agreement of views that it starts from."""
    p = monitor.p_wrong(readings.features)
    agreement, result = column(readings.features, "agreement"), {}
    for group in dict.fromkeys(readings.group):
        chosen = readings.group == group
        if 0 < readings.wrong[chosen].mean() < 1:
            result[group] = {"auroc": metrics.auroc(p[chosen], readings.wrong[chosen]),
                             "agreement": metrics.auroc(agreement[chosen], readings.wrong[chosen])}
    return result


def sayable(model, found, rows):
    """Of what ``gather_readings`` found, the readings of questions whose answer the model has a word for."""
    chosen = np.array([row.answer in model.config.answers for row in rows])[found["row"]]
    return {name: values[chosen] for name, values in found.items() if name != "rows"}


def usefulness(found):
    """(P(fixed | was wrong), P(broken | was right)) of taking in a result, over rows read before and after."""
    before = dict(zip(found["row"][found["depth"] == 0], found["wrong"][found["depth"] == 0]))
    again = found["depth"] == 1
    pairs = [(before[row], wrong) for row, wrong in zip(found["row"][again], found["wrong"][again])]
    fixed = [1 - after for was, after in pairs if was]
    broken = [after for was, after in pairs if not was]
    return float(np.mean(fixed)) if fixed else 0.0, float(np.mean(broken)) if broken else 0.0


def column(features, name):
    """One of the NUMBERS out of monitor features (n, f)."""
    return features[:, features.shape[1] - len(NUMBERS) + NUMBERS.index(name)]
