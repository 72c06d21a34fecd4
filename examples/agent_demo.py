"""Xura's main job: look at a picture, answer, doubt, call a tool, take in what it says, answer again.

Without arguments it draws a scene that the shipped model has never seen and asks about it: what can be
seen, how things lie to each other, a price it knows by heart, and two things that nobody can know from the
picture alone, where it has to notice that and call a tool.  Every answer is compared with the right one.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from xuravljepa.cli import compiling_notice, guard

EPILOG = """\
examples:
  python examples/agent_demo.py                              a scene, nine questions, two tools
  python examples/agent_demo.py --seed 7                     scene number 7, however it turns out
  python examples/agent_demo.py --ask "is the red one left or right?"
  python examples/agent_demo.py --image photo.jpg --ask "how many circles are there?"

The shipped model knows generated scenes: 3 to 6 circles, squares and triangles in 8 colours.  It answers in
a word, and says where it is unsure; on a photograph it should be.  training/README.md lists what it was
taught to answer.
"""
SEEN = ("shape", "count_shape", "existence", "closest_colour", "two_hop", "left_of")  # types of questions
SEARCHED = 20  # scenes that are looked through for one in which everything can be shown
PRICES = "(It knows the prices of six shops by heart; for any other it has to look into a list.)"
PHOTO = ("what shape is the red one?", "how many circles are there?", "is there a blue square?")


def story(number):
    """(picture, [questions answered from pixels or memory], [questions that need a tool]) of a test scene."""
    from training.data.questions import questions
    from training.data.scenes import render, scene
    from training.data.tools_data import tool_questions

    this = scene("test", number)
    known = tool_questions(this, "known", ("price",))
    return render(this), [*questions(this, types=SEEN), *known], tool_questions(this, "test")


def tell(agent, number):
    """Ask everything about a scene; (picture, replies, how much of the story can be seen in it)."""
    picture, plain, tools = story(number)
    replies = [agent.ask(picture, q.query, expected=q.answer) for q in (*plain, *tools)]
    shown = len(plain) == len(SEEN) + 1 and len(tools) == 2
    for question, reply in zip((*plain, *tools), replies):
        right, first = reply.answer == question.answer, reply.trace.steps[0]
        needed_tool = bool(reply.tool_calls) and first.answer != question.answer
        shown += right and not reply.unsure and (question in plain) != needed_tool
    return picture, replies, shown


def find_story(agent):
    """(number, what ``tell`` gives) of the first test scene in which most of the story can be seen."""
    best = None
    for number in range(SEARCHED):
        found = tell(agent, number)
        if best is None or found[2] > best[1][2]:
            best = number, found
        if found[2] == len(SEEN) + 4:
            break
    return best


def show(replies, quiet):
    """Print the answers, a line each, then the traces of those that took more than a look."""
    from xuravljepa.agent.story import percent

    for reply in replies:
        asked, right = reply.trace.run.question, reply.trace.run.expected
        verdict = "" if right is None else "right" if reply.answer == right else f"wrong: it is {right}"
        sure = f"{percent(reply.confidence)} sure{': a guess' if reply.unsure else ''}"
        after = f" after {reply.tool_calls[-1]['tool']}" if reply.tool_calls else ""
        print(f"  {asked:40s} {reply.answer:9s} {sure:18s} {verdict}{after}".rstrip())
    if replies[-1].trace.run.expected is not None:
        print(f"\n{PRICES}")
    for reply in () if quiet else replies:
        if reply.tool_calls or reply.unsure:
            print()
            reply.trace.show()


def write(args, picture, replies, caption):
    """Write the page, the picture of it, and the trace file."""
    from xuravljepa.agent.picture import write_png
    from xuravljepa.agent.report import write_html
    from xuravljepa.agent.story import Scene

    traces = tuple(reply.trace for reply in replies)
    shorter = traces if len(traces) <= 6 else (traces[0], traces[3], *traces[6:])  # one of each kind
    args.output.mkdir(parents=True, exist_ok=True)
    write_html(args.output / "story.html", [Scene(picture, traces, caption)])
    write_png(args.output / "story.png", [Scene(picture, shorter, caption)])
    for number, reply in enumerate(replies if args.trace else ()):
        reply.trace.write(args.trace, append=number > 0)
    files = [args.output / "story.html", args.output / "story.png", *([args.trace] if args.trace else [])]
    print(f"\nwritten: {', '.join(map(str, files))}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, metavar="N", help="take scene number N (default: the first of "
                        f"{SEARCHED} in which the whole story can be seen)")
    parser.add_argument("--image", metavar="FILE", help="ask about this picture instead of a drawn scene")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="ask this; can be repeated")
    parser.add_argument("--model", default="tiny", metavar="DIR",
                        help="folder of an agent (default: the shipped one)")
    parser.add_argument("--output", type=Path, default=Path("xura-demo"), metavar="DIR",
                        help="where story.html and story.png go (default ./xura-demo)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write every step there, as JSON Lines")
    parser.add_argument("--quiet", action="store_true", help="only the answers, no traces")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    from xuracore import set_num_threads
    from xuravljepa.agent.agent import Agent

    set_num_threads(1)  # small pictures gain nothing from more, and the answers' last bits depend on it
    agent = Agent.from_pretrained(args.model)
    with compiling_notice():
        agent.ask(story(0)[0], PHOTO[0])
    if args.image or args.ask:
        picture = args.image or story(args.seed or 0)[0]
        caption = args.image or f"scene {args.seed or 0}"
        replies = [agent.ask(picture, question) for question in args.ask or PHOTO]
    else:
        if args.seed is None:
            number, (picture, replies, _) = find_story(agent)
        else:
            number, (picture, replies, _) = args.seed, tell(agent, args.seed)
        caption = f"test scene {number}: never seen in training"
    print(f"{caption}\n")
    show(replies, args.quiet)
    write(args, picture, replies, caption)
    print(f"{time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
