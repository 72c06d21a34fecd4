"""What a tool is worth, found out by control questions: whether it errs, mends answers or breaks them.

A control is a question whose answer is known, or one that the agent answers with confidence by itself; what the
tool says there can be compared.  A tool that lies everywhere is so found out by questions that need no tool.
"""

import dataclasses

from xuracore import no_grad
from xuravljepa.agent.errors import ArgumentError
from xuravljepa.agent.tools import ToolRequest, Usefulness


@dataclasses.dataclass(frozen=True)
class Audit:
    """Of one tool: controls at which it was called, and its failures, false statements, and effects.

    wrong, right : controls answered so before the call.   mended, broken : by taking in what it said.
    """

    calls: int = 0
    failed: int = 0
    false: int = 0
    wrong: int = 0
    mended: int = 0
    right: int = 0
    broken: int = 0

    @property
    def errs(self):
        """P(it says something wrong), Jeffreys' estimate: never quite 0 or 1."""
        return (self.false + 0.5) / (self.calls - self.failed + 1)

    def usefulness(self, before):
        """``Usefulness`` after the audit; ``before``: what was expected, for what no control could show."""
        fixes = self.mended / self.wrong if self.wrong else before.fixes * (1 - self.errs)
        breaks = self.broken / self.right if self.right else before.breaks
        return Usefulness(fixes, breaks, before.cost, self.errs)


@no_grad()
def audit(agent, controls, apply=False):
    """Call every tool that applies at each control question; {tool's name: Audit}.

    Args:
        agent: ``Agent``.
        controls: (picture, question, answer) triples; the answer is None where the agent's own counts, if it is
            confident, and the control is left out if it is not.
        apply: give the tools the usefulness that was found.
    """
    found = {}
    for image, question, answer in controls:
        query, visual = agent.model.query_tokens([question]), agent.view(agent.model.pixels(image))
        reading, confidence = agent.glance(query, visual)
        if answer is None:
            if 1 - confidence >= agent.recursion.confident_below:
                continue
            answer = reading.answer
        for tool in agent.tools:
            if tool.applies(question):
                one = found.setdefault(tool.name, Audit())
                found[tool.name] = _called(agent, tool, query, visual, question, reading, answer, one)
    if apply:
        for name, one in found.items():
            agent.tools.appraise(name, one.usefulness(agent.tools.get(name).usefulness))
    return found


def _called(agent, tool, query, visual, question, reading, answer, before):
    """``before`` with one more call counted."""
    try:
        arguments = tool.fill(question, lambda text: agent.plain_answer(visual, text))
    except ArgumentError:
        return before
    result = agent.tools.run(ToolRequest(tool.name, arguments, question))
    if not result.ok:
        return dataclasses.replace(before, calls=before.calls + 1, failed=before.failed + 1)
    again, _ = agent.glance(query, visual, [result])
    right, after = reading.answer == answer, again.answer == answer
    return Audit(before.calls + 1, before.failed, before.false + (result.text.strip().lower() != answer),
                 before.wrong + (not right), before.mended + (after and not right),
                 before.right + right, before.broken + (right and not after))
