"""Phase 3: when to doubt, which tool to call, and how to take in what it said.  The model is frozen.

Two stages, each an ordinary training run:

1. ``InjectionBatches`` and ``injection_objective``: the StateInjector learns the difference that reading the
   tool's text makes to the states (the privileged context), and to answer right after it; the ToolSelector
   learns which tool a question calls for, or none.
2. ``ReadingBatches`` and ``monitor_objective``: the ConfusionMonitor learns from the model's own right and
   wrong answers to questions it was not trained on, before and after an injection.
"""

import numpy as np

from training.data.strange import strange_image
from training.parallel import ALONE
from training.phases.common import RowBatches, generator
from training.phases.jepa import Example, collate
from xuracore import no_grad, ops
from xuravljepa import image as images
from xuravljepa.agent.confusion import monitor_features
from xuravljepa.agent.injector import injection_loss, state_change


class InjectionBatches:
    """Tool questions with what a tool says, and plain questions that need no tool.

    {"query", "visual", "said" (texts, one per tool row), "answers", "tools" (names or None)}; tool rows come
    first.  Half of the numbers said are random, so that nothing can be known but by listening.   ranks : those that
    share each batch; this one gives its part of it.
    """

    def __init__(self, model, tool_rows, plain_rows, features, batch_size, seed=0, numbers=31, ranks=ALONE):
        self._model, self._features, self._numbers, self._seed = model, features, numbers, seed
        self._tools = RowBatches(tool_rows, batch_size, seed)
        self._plain, self._ranks = RowBatches(plain_rows, max(batch_size // 2, 1), seed + 1), ranks

    def batch(self, step):
        rng = generator(self._seed, 3, step)
        tool_rows, plain_rows = self._tools.rows_of(step), self._plain.rows_of(step)
        said = [str(rng.integers(self._numbers)) if row.answer.isdigit() and rng.random() < 0.5
                else str(row.tool["result"]) for row in tool_rows][self._ranks.part(len(tool_rows))]
        tool_rows, plain_rows = (rows[self._ranks.part(len(rows))] for rows in (tool_rows, plain_rows))
        rows = [*tool_rows, *plain_rows]
        batch = collate(self._model, [Example(row, row.answer, None) for row in rows], self._features)
        return {"query": batch["query"], "visual": batch["visual"], "said": said, "answers": said,
                "tools": [row.tool["name"] for row in tool_rows] + [None] * len(plain_rows)}


def injection_objective(model, cards, weight_state=4.0, weight_answer=1.0, weight_tool=1.0):
    """The loss of stage 1 over a module with ``injector`` and ``selector``.

    cards : {tool name: text that describes it}.
    """
    names = tuple(cards)
    with no_grad():
        encoded = card_embeddings(model, cards.values())
        bank = model.answer_bank()[1]
    place = {text: i for i, text in enumerate(model.config.answers)}

    def loss_function(heads, batch, rng=None):
        told = len(batch["said"])
        query = batch["query"]
        with no_grad():
            states = model.predictor.look(query, batch["visual"])
            pooled = model.predictor.read(query, states).pooled
            states = [_first(state, told) for state in states]
            taught = model.predictor.hear(model.tool_tokens(batch["said"]), states)
            knowledge = model.encode_answers(batch["said"])
        target = np.array([place[text] for text in batch["answers"]])
        injector = heads.injector
        metrics, loss = {}, 0.0
        if injector.config.mode == "residual":
            reading = model.predictor.read(query[:told], states, injector.bias(knowledge),
                                           injector.config.residual_layer)
        else:
            injected = injector(knowledge, states)
            reading = model.predictor.read(query[:told], injected)
            unexplained = injection_loss(states, injected, taught)
            loss = unexplained * weight_state
            metrics["explained"] = 1.0 - unexplained.item()
            metrics["change"] = float(state_change(states, injected).mean())
        logits = ops.linear(reading.embedding, bank) * model.scale
        answer_loss = ops.cross_entropy(logits, target)
        wanted = np.array([0 if name is None else 1 + names.index(name) for name in batch["tools"]])
        chosen = heads.selector(pooled, encoded, names)
        tool_loss = ops.cross_entropy(chosen, wanted)
        metrics["answer"] = float((logits.data.argmax(axis=1) == target).mean())
        metrics["tool"] = float((chosen.data.argmax(axis=1) == wanted).mean())
        return loss + answer_loss * weight_answer + tool_loss * weight_tool, metrics

    return loss_function


def _first(state, count):
    """The first ``count`` samples of a state."""
    return type(state)(*(part[:count] for part in state))


def card_embeddings(model, cards):
    """(tools, E) array: the Y-Encoder's reading of the tools' cards, cut to what it can read."""
    limit = model.config.text.max_length - 1
    return model.encode_answers([card.encode()[:limit].decode(errors="ignore") for card in cards]).data


# ---------------------------------------------------------------------- stage 2: the monitor
@no_grad()
def gather_readings(model, heads, rows, features, batch_size=64, inject=True, report=None):
    """The model's readings of rows as monitor features and labels.

    Each row is read once; tool rows are read again with the tool's text injected.  Returns a dict of arrays:
    features (n, f), wrong (n,) 0/1, depth (n,), top (n,) greatest probability of the answers' softmax,
    row (n,) index into rows.   inject : whether to read tool rows again.
    """
    found = {"features": [], "wrong": [], "depth": [], "top": [], "row": []}
    answers = np.array(model.config.answers)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        batch = collate(model, [Example(row, row.answer, None) for row in chosen], features)
        states = model.predictor.look(batch["query"], batch["visual"])
        reading = model.predictor.read(batch["query"], states)
        truth = np.array([row.answer for row in chosen])
        strangeness = heads.monitor.familiarity(batch["visual"])
        index = np.arange(start, start + len(chosen))
        _note(found, model, reading, strangeness, answers, truth, index, 0, 0.0)
        told = [i for i, row in enumerate(chosen) if row.tool] if inject else []
        if told:
            said = [str(chosen[i].tool["result"]) for i in told]
            before = [type(state)(*(part[np.array(told)] for part in state)) for state in states]
            after = heads.injector(model.encode_answers(said), before)
            again = model.predictor.read(batch["query"][told], after)
            _note(found, model, again, strangeness[told], answers, truth[told], index[told], 1,
                  state_change(before, after))
        if report is not None:
            report(start + len(chosen), len(rows))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _note(found, model, reading, strangeness, answers, truth, index, depth, change):
    cosines = model.similarities(reading.embedding)
    gate = model.predictor.gate_activation()
    gate = np.full(len(truth), 0.5) if gate is None else gate.mean(axis=0)
    features = monitor_features(reading.pooled.data, cosines, model.scale, gate, strangeness, depth, change)
    logits = cosines.astype(np.float64) * model.scale
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    found["features"].append(features)
    found["wrong"].append((answers[cosines.argmax(axis=1)] != truth).astype(np.int64))
    found["depth"].append(np.full(len(truth), depth))
    found["top"].append((p / p.sum(axis=1, keepdims=True)).max(axis=1))
    found["row"].append(index)


@no_grad()
def strange_readings(model, heads, rows, count, seed=0, batch_size=64):
    """Readings of questions about pictures that are no scenes: every answer counts as wrong."""
    parts = []
    for start in range(0, count, batch_size):
        number = min(batch_size, count - start)
        pixels = np.stack([images.prepare(strange_image(start + i, seed), model.config.preprocessing)
                           for i in range(number)])
        chosen = [rows[(start + i) % len(rows)] for i in range(number)]
        visual = model.visual_tokens(pixels)
        query = model.query_tokens([row.query for row in chosen])
        reading = model.predictor(query, visual)
        cosines = model.similarities(reading.embedding)
        gate = model.predictor.gate_activation()
        gate = np.full(number, 0.5) if gate is None else gate.mean(axis=0)
        parts.append(monitor_features(reading.pooled.data, cosines, model.scale, gate,
                                      heads.monitor.familiarity(visual)))
    return np.concatenate(parts)


class ReadingBatches:
    """{"features", "wrong"}: readings in an order that is a function of (seed, step)."""

    def __init__(self, features, wrong, batch_size, seed=0, ranks=ALONE):
        self._features, self._wrong, self._part = features, wrong, ranks.part(batch_size)
        self._batches = RowBatches(range(len(wrong)), batch_size, seed)

    def batch(self, step):
        chosen = self._batches.rows_of(step)[self._part]
        return {"features": self._features[chosen], "wrong": self._wrong[chosen]}


def monitor_objective(heads, batch, rng=None):
    """(binary cross-entropy, {"accuracy"})."""
    logits = heads.monitor(batch["features"])
    loss = ops.bce_with_logits(logits, batch["wrong"].astype(np.float32))
    return loss, {"accuracy": float(((logits.data > 0) == (batch["wrong"] > 0)).mean())}


def usefulness(readings):
    """(P(fixed | was wrong), P(broken | was right)) of an injection, over rows read before and after."""
    before = {row: wrong for row, wrong, depth in zip(readings["row"], readings["wrong"], readings["depth"])
              if depth == 0}
    pairs = [(before[row], wrong) for row, wrong, depth in
             zip(readings["row"], readings["wrong"], readings["depth"]) if depth == 1]
    fixed = [1 - after for was, after in pairs if was]
    broken = [after for was, after in pairs if not was]
    return float(np.mean(fixed)) if fixed else 0.0, float(np.mean(broken)) if broken else 0.0
