"""Phase 3, stage 1: which tool to call, and how to take in what it said.  The model is frozen.

The StateInjector learns the difference that reading the tool's text makes to the states (the privileged
context), and to answer right after it; the ToolSelector learns which tool a question calls for, or none.
Stage 2, the monitor, is in ``training/phases/monitor.py``.
"""

import numpy as np

from training.data.questions import YES_NO
from training.data.scenes import SHAPES
from training.data.tools_data import MAX_COUNT
from training.parallel import ALONE
from training.phases.common import RowBatches, generator
from training.phases.jepa import Example, collate, said_by_tool
from xuracore import no_grad, ops
from xuravljepa.agent.injector import injection_loss


class InjectionBatches:
    """Tool questions with what a tool says, and plain questions that need no tool.

    {"query", "visual", "said" and "answers" (texts, one per tool row), "tools" (names or None)}; tool rows come
    first.  Half of what is said is drawn at random, so that nothing can be known but by listening.   rumours : {tool:
    what else it might have said}, among the known answers; by default what suits generated questions.   ranks : those
    that share each batch; this one gives its part of it.
    """

    def __init__(self, model, tool_rows, plain_rows, features, batch_size, seed=0, numbers=31, ranks=ALONE,
                 rumours=None):
        self._model, self._features, self._numbers, self._seed = model, features, numbers, seed
        self._tools, self._rumours = RowBatches(tool_rows, batch_size, seed), rumours
        plain_size = max(batch_size // 2, 1)
        self._plain = RowBatches(plain_rows, plain_size, seed + 1) if plain_rows else None
        self._ranks = ranks

    def batch(self, step):
        rng = generator(self._seed, 3, step)
        tool_rows, plain_rows = self._tools.rows_of(step), self._plain.rows_of(step) if self._plain else []
        texts = [self._rumour(row, rng) if rng.random() < 0.5 else (said_by_tool(row), row.answer)
                 for row in tool_rows][self._ranks.part(len(tool_rows))]
        tool_rows, plain_rows = (rows[self._ranks.part(len(rows))] for rows in (tool_rows, plain_rows))
        rows = [*tool_rows, *plain_rows]
        batch = collate(self._model, [Example(row, row.answer, None) for row in rows], self._features)
        said, answers = (list(each) for each in zip(*texts))
        return {"query": batch["query"], "visual": batch["visual"], "said": said, "answers": answers,
                "tools": [row.tool["name"] for row in tool_rows] + [None] * len(plain_rows)}

    def _rumour(self, row, rng):
        """(what the tool might have said, the answer that follows): of the same kind, or nobody would believe it."""
        if self._rumours is not None:
            if said_by_tool(row) != row.answer.strip().lower():  # what follows from another result is not known
                return said_by_tool(row), row.answer
            answer = str(rng.choice(self._rumours[row.tool["name"]]))
            return answer.strip().lower(), answer
        kinds = [kind for kind in (YES_NO, SHAPES) if row.answer in kind]
        numbers = MAX_COUNT + 1 if row.type == "earlier count" else self._numbers
        answer = str(rng.choice(kinds[0]) if kinds else rng.integers(numbers))
        return answer, answer


def injection_objective(model, cards, weight_state=4.0, weight_answer=1.0, weight_tool=1.0):
    """The loss of stage 1 over a module with ``injector`` and ``selector``.

    The teacher is followed where it understood the text, that is, says it when asked; phase 1 taught it numbers.
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
            states = [_take(state, slice(told)) for state in states]
            taught = model.predictor.hear(model.tool_tokens(batch["said"]), states)
            knowledge = model.encode_answers(batch["said"])
            target = np.array([place[text] for text in batch["answers"]])
            understood = model.predictor.read(query[:told], taught).embedding.data @ bank.T
            followed = np.flatnonzero(understood.argmax(axis=1) == target)
        injector = heads.injector
        metrics, loss = {}, 0.0
        after = injector.take_in(model.predictor, None, knowledge, states)
        reading = after.read(model.predictor, query[:told], injector.config.residual_layer)
        metrics["change"] = float(np.mean(after.change))
        if injector.config.mode in ("state", "token"):  # the others leave the states alone
            metrics["explained"] = 0.0
            if len(followed):
                unexplained = injection_loss(*([_take(state, followed) for state in each]
                                               for each in (states, after.states, taught)))
                loss = unexplained * (weight_state * len(followed) / told)
                metrics["explained"] = 1.0 - unexplained.item()
        logits = ops.linear(reading.embedding, bank) * model.scale
        answer_loss = ops.cross_entropy(logits, target)
        wanted = np.array([0 if name is None else 1 + names.index(name) for name in batch["tools"]])
        chosen = heads.selector(pooled, encoded, names)
        tool_loss = ops.cross_entropy(chosen, wanted)
        metrics["answer"] = float((logits.data.argmax(axis=1) == target).mean())
        metrics["tool"] = float((chosen.data.argmax(axis=1) == wanted).mean())
        return loss + answer_loss * weight_answer + tool_loss * weight_tool, metrics

    return loss_function


def _take(state, rows):
    """Some samples of a state."""
    return type(state)(*(part[rows] for part in state))


def card_embeddings(model, cards):
    """(tools, E) array: the Y-Encoder's reading of the tools' cards, cut to what it can read."""
    limit = model.config.text.max_length - 1
    return model.encode_answers([card.encode()[:limit].decode(errors="ignore") for card in cards]).data
