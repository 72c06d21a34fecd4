"""A trace as text in a terminal."""

import json
import textwrap

from xuravljepa.agent.trace import printable

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "36"}
_BAR = 10  # cells of the bar of p(wrong)
_MARGIN = 33  # columns before the story of a step

REASON_TEXT = {
    "confident": "it is sure enough",
    "abstain": "it is unsure, and nothing it could call promises help",
    "max_depth": "it has read as often as it may",
    "budget": "its budget is spent",
    "repeated_call": "it wanted to repeat a call",
    "tool_error": "the tools that fit have failed",
    "no_tool": "it is not sure, and there is no tool for this question",
}


def render(trace, width=100, colour=False):
    """See ``Trace.render``."""
    def paint(text, *styles):
        return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m" if colour else text

    lines = [paint("question  ", "dim") + paint(printable(trace.run.question), "bold")]
    about = [f"model {trace.run.model[:24]}" if trace.run.model else "",
             f"seed {trace.run.seed}" if trace.run.seed is not None else "", f"run {trace.run.run_id[:16]}"]
    lines.append(paint("about     " + printable("  ".join(filter(None, about))), "dim"))
    lines.append("")
    lines.append(paint(f"{'':2}#  {'time':>9}   {'p(wrong)':<16}what happened", "dim"))
    for step in trace.steps:
        story = _story(step)
        head, body = story[0], story[1:]
        before, after = step.p_wrong_before, step.p_wrong_after
        p = after if after is not None else before
        shown = "" if p is None or step.action == "answer" else f"{p:.2f} {_bar(p)}"
        cells = [f"{step.step:>3}", f"{_seconds(step.time):>9}", f"{shown:<15}"]
        style = _style(p)
        wrapped = _wrap(head, width) + [line for text in body for line in _wrap(text, width, "  ")]
        emphasis = ("bold", style) if step.action == "answer" else ()
        first = paint(wrapped[0], *emphasis) if emphasis else wrapped[0]
        lines.append(f"{cells[0]}  {paint(cells[1], 'dim')}   {paint(cells[2], style)} {first}")
        lines += [" " * _MARGIN + paint(line, "dim") for line in wrapped[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _story(step):
    """What to say about a step: a headline, then details."""
    if step.action == "read":
        lines = [f"read the picture: {_quoted(step.answer)}", _nearest(step), step.note]
    elif step.action == "call":
        call = describe_call(step)
        lines = [call, *(f"asked itself: {question} → {_quoted(answer)}" for question, answer in step.asked)]
        if step.state_change is not None:
            lines.append(f"injected; the state changed by {100 * step.state_change:.1f} %")
        if step.p_wrong_after is not None:
            lines += [f"read again: {_quoted(step.answer)}", _nearest(step)]
        lines.append(step.note)
    else:
        p = step.p_wrong_after
        sure = "" if p is None else f"  (p wrong {p:.2f})"
        lines = [f"answer: {_quoted(step.answer)}{sure}",
                 f"{step.reason}: {REASON_TEXT.get(step.reason, '')}", step.note]
        if step.tool is not None:
            lines.append(f"the call was {step.tool}({format_arguments(step.arguments)})")
    return [printable(line) for line in lines if line]


def describe_call(step):
    """``lookup(shop="zorba", item="circle") → 7   0.3 ms`` or what went wrong."""
    call = f"{step.tool}({format_arguments(step.arguments)})"
    if step.result is None:
        return call
    if not step.result.ok:
        return f"{call} failed: {step.result.error.type}: {step.result.error.message}"
    text = step.result.text if len(step.result.text) <= 120 else step.result.text[:119] + "…"
    return f"{call} → {text}" + ("" if step.ms is None else f"   {step.ms:.1f} ms")


def format_arguments(arguments, most=120):
    """``name=value`` pairs as a programmer would write them."""
    if arguments is None:
        return "?"
    text = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items())
    return text if len(text) <= most else text[:most - 1] + "…"


def _nearest(step):
    if not step.candidates:
        return ""
    return "nearest: " + ", ".join(f"{label} {similarity:.2f}" for label, similarity in step.candidates)


def _quoted(text):
    return f"“{text}”"


def _bar(p):
    full = round(_BAR * p)
    return "█" * full + "·" * (_BAR - full)


def _style(p):
    if p is None:
        return "dim"
    return "green" if p < 0.2 else "yellow" if p < 0.5 else "red"


def _seconds(seconds):
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _wrap(text, width, indent=""):
    return textwrap.wrap(text, max(width - _MARGIN, 30), initial_indent=indent,
                         subsequent_indent=indent + "  ") or [""]
