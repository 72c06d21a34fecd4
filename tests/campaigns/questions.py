"""Ask thousands of questions in a row of one agent:  python tests/campaigns/questions.py --help

Memory must stay flat and accuracy must not drift: the run is cut into ten parts of equal length, each of
which asks the same questions about the same scenes, so that every part must give the same answers.  Exit
status 1 if resident memory or open files grow, or if a part differs from the first.
"""

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.campaigns.faults import memory_and_files
from training.data.questions import questions
from training.data.scenes import render, scene
from training.data.tools_data import tool_questions
from xuravljepa import Agent

PARTS = 10
GROWTH = 8.0  # MiB between the second part and the last


def exam(count):
    """[(scene's number, question, right answer)] in the order in which they are asked."""
    asked, number = [], 0
    while len(asked) < count:
        this = scene("test", number)
        found = [*questions(this), *tool_questions(this, "test")]
        asked += [(number, one.query, one.answer) for one in found]
        number += 1
    return asked[:count]


def soak(agent, count):
    """(share of right answers, resident MiB, open files, seconds, same answers as the first part) of each part."""
    asked, first = exam(count // PARTS), None
    for _ in range(PARTS):
        start, seen, right, answers = time.perf_counter(), None, 0, []
        for number, question, answer in asked:
            reply = agent.ask(None if number == seen else render(scene("test", number)), question)
            seen, right = number, right + (reply.answer == answer)
            answers.append((reply.answer, reply.confidence))
        first = first or answers
        yield right / len(asked), *memory_and_files(), time.perf_counter() - start, answers == first


def main(arguments=None):
    """Run the campaign and print a Markdown table; returns 1 if something grew or drifted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10_000, help="in all (default 10000)")
    parser.add_argument("--model", default="tiny", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.questions < PARTS:
        parser.error(f"--questions is at least {PARTS}")
    rows = []
    print("| questions | right | resident MiB | open files | ms each | same answers |\n|--:|--:|--:|--:|--:|---|")
    size = options.questions // PARTS
    for row in soak(Agent.from_pretrained(options.model), options.questions):
        right, resident, files, seconds, same = row
        rows.append(row)
        print(f"| {len(rows) * size} | {right:.2%} | {resident:.1f} | {files} | {1e3 * seconds / size:.1f} | "
              f"{'yes' if same else 'no'} |", flush=True)
    grown = rows[-1][1] - rows[1][1] > GROWTH or rows[-1][2] > rows[1][2]
    return int(grown or not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
