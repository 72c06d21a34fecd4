"""The agent on generated scenes: doubt beside max-softmax, tools beside their controls, and taking in what they say.

Everything here is measured on splits that no training touched: ``test`` scenes and tool keys of the pool ``test``.
Doubt is also measured on questions of one's own.
"""

import dataclasses

import numpy as np

from training import metrics
from training.data.dataset import Dataset
from training.phases import agent as phase
from training.phases import monitor as judging
from training.phases.common import FeatureStore
from xuracore import no_grad
from xuravljepa.agent.recursion import RecursionConfig
from xuravljepa.agent.tools import Usefulness


def doubt_report(model, heads, scenes=500, seed=0, rows=None, report=None):
    """The monitor on test scenes and test keys, or on ``rows``: AUROC, ECE, coverage at risks, beside max-softmax.

    {"questions", "wrong", …} with a part for all questions, those about the picture, and those that need a tool; none
    where nothing is right, or nothing wrong, or it would say the same again.
    """
    if rows is None:
        plain = Dataset.scenes("test", scenes, seed).rows
        plain = plain[:: max(1, len(plain) // (6 * scenes))]
        rows = [*plain, *Dataset.tools("test", scenes, seed, pools=("known", "test")).rows]
    found = judging.gather_readings(model, heads, rows, inject=False, report=report)
    wrong, p = found["wrong"], heads.monitor.p_wrong(found["features"])
    tool = np.array([rows[i].tool is not None for i in found["row"]])
    result = {"questions": len(rows), "wrong": float(wrong.mean())}
    for name, chosen in (("all", slice(None)), ("plain", ~tool), ("tool", tool)):
        right = 1 - wrong[chosen]
        if not 0 < right.sum() < len(right) or name == "plain" and not tool.any():
            continue
        result[name] = {"wrong": float(wrong[chosen].mean())}
        for judge, doubt in (("monitor", p[chosen]), ("max_softmax", 1 - found["top"][chosen])):
            result[name][judge] = {
                "auroc": metrics.auroc(doubt, wrong[chosen]),
                "ece": metrics.expected_calibration_error(np.clip(1 - doubt, 0, 1), right),
                "coverage_at_1_percent_risk": metrics.coverage_at_risk(1 - doubt, right, 0.01),
            }
    strange = judging.strange_readings(model, heads, rows, 200, seed + 1)
    result["strange_pictures_called_unsure"] = float(
        (heads.monitor.p_wrong(strange) > heads.config.abstain_above).mean())
    return result


def tool_report(agent, scenes=300, seed=0, report=None):
    """Tool questions, known and unseen keys in one template, through the agent itself.

    Accuracy without tools, gated, always, and with an oracle gate; harm; arguments filled exactly.
    """
    rows = Dataset.tools("test", scenes, seed, pools=("known", "test")).rows
    eager = RecursionConfig(0.0, agent.recursion.abstain_above, budget=agent.recursion.budget)
    alone, gated, always, called, exact = [], [], [], [], []
    for i, row in enumerate(rows):
        data = Dataset("one", [row])[0]
        reply = agent.ask(data.image, row.query)
        alone.append(reply.trace.steps[0].answer == row.answer)
        gated.append(reply.answer == row.answer)
        called.append(bool(reply.tool_calls))
        with _settings(agent, eager):
            forced = agent.ask(data.image, row.query)
        final = forced.trace.readings()[-1].answer if forced.tool_calls else forced.answer
        always.append(final == row.answer)
        if forced.tool_calls:
            exact.append(forced.tool_calls[0]["result"] == str(row.tool["result"]))
        if report is not None:
            report(i + 1, len(rows))
    alone, gated, always, called = (np.array(x) for x in (alone, gated, always, called))
    known = np.array([row.meta["known"] for row in rows])
    result = {"questions": len(rows), "results_exact": float(np.mean(exact)) if exact else float("nan")}
    for name, chosen in (("all", slice(None)), ("known", known), ("unseen", ~known)):
        a, g, f, c = alone[chosen], gated[chosen], always[chosen], called[chosen]
        result[name] = {"without_tools": float(a.mean()), "gated": float(g.mean()), "always": float(f.mean()),
                        "oracle_gate": float((a | f).mean()), "calls": float(c.mean()),
                        "harm": float((c & a & ~g).mean())}
    return result


class _settings:
    """Inside, the agent calls a tool whenever one applies."""

    def __init__(self, agent, recursion):
        self.agent, self.recursion = agent, recursion

    def __enter__(self):
        self.kept = self.agent.recursion
        self.tools = dict(self.agent.tools._tools)
        self.agent.recursion = self.recursion
        for name, tool in self.tools.items():
            self.agent.tools._tools[name] = dataclasses.replace(tool, usefulness=Usefulness(1.0, 0.0, 0.0))

    def __exit__(self, *_):
        self.agent.recursion = self.kept
        self.agent.tools._tools.update(self.tools)


def injection_report(model, heads, scenes=200, seed=0, batches=8):
    """Held-out tool questions: explained variance, and accuracy of each way to take in a result.

    without: nothing told; token: the result read as text; the heads' own mode.  Numbers told are random half
    of the time, and keys are of the test pool.
    """
    rows = Dataset.tools("test", scenes, seed, pools=("test",)).rows
    plain = Dataset.scenes("test", max(scenes // 8, 4), seed).rows
    features = FeatureStore(model, [*rows, *plain])
    held = phase.InjectionBatches(model, rows, plain, features, 64, seed + 11)
    objective = phase.injection_objective(model, heads.config.cards)
    found, without, token = [], [], []
    with no_grad():
        for step in range(batches):
            batch = held.batch(step)
            found.append(objective(heads, batch)[1])
            told = len(batch["said"])
            query, visual = batch["query"][:told], batch["visual"][:told]
            truth = np.array(batch["answers"])
            known = np.array(model.config.answers)
            for kept, tool in ((without, None), (token, model.tool_tokens(batch["said"]))):
                embedding = model.predictor(query, visual, tool).embedding
                kept.append((known[model.similarities(embedding).argmax(axis=1)] == truth).mean())
    mean = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
    result = {"mode": heads.config.injector.mode, "accuracy": mean["answer"], "token": float(np.mean(token)),
              "without": float(np.mean(without)), "tool_selection": mean["tool"]}
    if "explained" in mean:
        result.update(explained_variance=mean["explained"], state_change=mean["change"])
    return result
