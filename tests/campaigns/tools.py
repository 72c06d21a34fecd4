"""Give an agent tools that raise, hang, fork, allocate, lie:  python tests/campaigns/tools.py --help

For each adversary (tests/campaigns/adversaries.py), once in the warm worker and once in a fork, the agent is asked a
question that calls it.  It must answer within 1.2 times its budget, with the call recorded; the next question, which
needs no tool, must get the very answer it got before, and so must one that calls a tool that behaves.  At the
end no process, open file, thread or temporary folder may be left, and memory must not have grown.  Exit
status 1 otherwise.  Every adversary is bounded: 128 MiB of memory and as much of disk, 16 children.

On a busy machine a process can be kept waiting for seconds, whatever it does.  A thread that only sleeps notices, and
that time is taken off a question's; the last line says how much it was.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.campaigns import adversaries
from training.data.scenes import render, scene
from xuravljepa import Agent
from xuravljepa.agent.arguments import FromQuestion
from xuravljepa.agent.budget import Budget
from xuravljepa.agent.recursion import RecursionConfig
from xuravljepa.agent.sandbox import Limits
from xuravljepa.agent.tools import ToolRegistry, Usefulness

PLAIN = "what shape is the red one?"
CHILDREN = {function.__name__ for function in adversaries.CHILDREN}
GOOD = {function.__name__ for function in adversaries.GOOD}
GROWTH = 16.0  # MiB
SURE = Usefulness(fixes=1.0, breaks=0.0, cost=0.0)
MEMORY = 128 * 2**20


def doubtful_agent(seconds):
    """The shipped model with a monitor that always doubts, and the adversaries as tools."""
    shipped = Agent.from_pretrained("tiny")
    shipped.heads.monitor.output.weight.data[:] = 0
    shipped.heads.monitor.output.bias.data[:] = 4.0
    recursion = RecursionConfig(0.0, 1.0, budget=Budget(depth=1, calls=1, seconds=seconds))
    return Agent(shipped.model, shipped.heads, ToolRegistry(), recursion)


def register(tools):
    """The adversaries as tools: each way under a name and a word of its own.  Closures run in a fork."""
    for function, children in ((adversaries.misbehave, False), (adversaries.misbehave_with_children, True)):
        limits = Limits(seconds=3600.0, memory_bytes=MEMORY, processes=children)  # the agent's budget is less
        for place, make in (("worker", lambda function: function), ("fork", closure)):
            name = f"{'children' if children else 'alone'}_in_{place}"
            tools.register(make(function), name=name, arguments={"kind": FromQuestion(rf"\b{name} (\w+)")},
                           limits=limits, usefulness=SURE)


def closure(function):
    def misbehave(kind: str) -> int:
        return function(kind)

    misbehave.__doc__ = function.__doc__
    return misbehave


class Waiting:
    """While it is entered, ``seconds`` counts how long this process was not let run."""

    NAP, NOTICED = 0.05, 0.02

    def __init__(self):
        self.seconds, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        before = time.monotonic()
        while not self._end.wait(self.NAP):
            late = time.monotonic() - before - self.NAP
            self.seconds += late if late > self.NOTICED else 0.0
            before = time.monotonic()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._end.set()
        self._thread.join()


def left_open(folder):
    """(processes that run below ``folder``, open files, threads, entries of ``folder``, resident MiB)."""
    processes = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ended = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            processes += not ended and os.readlink(process / "cwd").startswith(folder)
        except OSError:  # it ended meanwhile, or is another user's
            pass
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return processes, len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir(folder)), resident


def attack(agent, tool, kind, seconds, calm, waiting):
    """(seconds the question took, kind of the recorded failure or "answered", what went wrong)."""
    start, kept = time.monotonic(), waiting.seconds
    reply = agent.ask(None, f"what is it? {tool} {kind}")
    time.sleep(2 * waiting.NAP)  # until the watch has noticed
    took, wrong = time.monotonic() - start - 2 * waiting.NAP - (waiting.seconds - kept), []
    calls = reply.trace.calls()
    outcome = "no call" if not calls else "answered" if calls[0].result.ok else calls[0].result.error.type
    if took > 1.2 * seconds:
        wrong.append(f"took {took:.2f} s")
    if len(calls) != 1 or (outcome == "answered") != (kind in GOOD):
        wrong.append(f"recorded as {outcome}")
    if (calm.answer, calm.confidence) != again(agent, PLAIN):
        wrong.append("changed the next answer")
    if (said := call_again(agent, tool, waiting)) != "7":
        wrong.append(f"broke the next call: {said}")
    return took, outcome, wrong


def again(agent, question):
    """(answer, confidence) of a question."""
    reply = agent.ask(None, question)
    return reply.answer, reply.confidence


def call_again(agent, tool, waiting):
    """What a tool that behaves says.  Where its process was not let run in time it is called once more."""
    said = "nothing"
    for _ in range(5):
        kept = waiting.seconds
        calls = agent.ask(None, f"what is it? {tool} well_behaved").trace.calls()  # none where the budget was over
        if calls and calls[0].result.ok:
            return calls[0].result.text
        said = calls[0].result.error.type if calls else "no call"
        if said not in ("Timeout", "no call") or waiting.seconds == kept:
            break
    return said


def campaign(kinds, seconds, rounds):
    """Rows (adversary, where, worst seconds, outcomes, what went wrong), and at last one about what is left."""
    picture, rows = render(scene("test", 3)), {}
    with tempfile.TemporaryDirectory() as folder:
        before, tempfile.tempdir = tempfile.tempdir, folder
        try:
            agent = doubtful_agent(seconds)
            with agent.tools, Waiting() as waiting:
                register(agent.tools)
                calm = agent.ask(picture, PLAIN)
                call_again(agent, "alone_in_worker", waiting)  # starts the worker
                for turn in range(rounds):
                    for kind in kinds:
                        for place in ("worker", "fork"):
                            family = "children" if kind in CHILDREN else "alone"
                            found = attack(agent, f"{family}_in_{place}", kind, seconds, calm, waiting)
                            row = rows.setdefault((kind, place), [0.0, set(), []])
                            row[0] = max(row[0], found[0])
                            row[1].add(found[1])
                            row[2] += found[2]
                    if turn == 0:
                        first = left_open(folder)
                last = left_open(folder)
            closed = left_open(folder)
        finally:
            tempfile.tempdir = before
    names = "processes", "files", "threads"
    wrong = [f"{what} grew from {a} to {b}" for what, a, b in zip(names, first, last) if b > a]
    wrong += [f"{what} are left" for what, count in (("processes", closed[0]), ("folders", closed[3])) if count]
    if last[4] - first[4] > GROWTH:
        wrong.append("memory grew")
    detail = {f"{last[0]} process, {last[1]} files, {last[2]} threads; {first[4]:.0f} → {last[4]:.0f} MiB; "
              f"kept waiting for {waiting.seconds:.1f} s"}
    return [(*key, *row) for key, row in rows.items()] + [("what is left", "", 0.0, detail, wrong)]


def main(arguments=None):
    """Run the campaign and print a Markdown table; returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only adversaries whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="budget of a question (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each of them (default 2)")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in adversaries.ALL if options.only in kind and not kind.startswith("misbehave")]
    rows = campaign(kinds, options.seconds, options.rounds)
    print("| adversary | where | worst time / budget | recorded as | wrong |\n|---|---|--:|---|---|")
    for kind, place, took, outcomes, wrong in rows:
        print(f"| {kind} | {place} | {took / options.seconds:.2f} | {', '.join(sorted(outcomes))} "
              f"| {'; '.join(wrong)} |")
    return int(any(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
