"""A tool of your own: a function with type hints and a docstring, and where its arguments come from.

    python examples/custom_tool.py
    python examples/custom_tool.py --image scene.png --ask "what does the red one weigh in steel?"

The question names a colour and a material; the model says which shape has that colour, the tool knows what
such a shape weighs.  The tool runs in a process of its own, with limits that end it.  The shipped model says
whole numbers up to 30.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from xuravljepa import Agent
from xuravljepa.agent import AskModel, FromQuestion, Limits
from xuravljepa.cli import guard

VOLUMES, DENSITIES = {"circle": 4, "square": 3, "triangle": 2}, {"steel": 7, "glass": 3, "wood": 1}


def weigh(shape: str, material: str) -> int:
    """Tell what a shape weighs.

    Args:
        shape: circle, square or triangle
        material: steel, glass or wood

    Returns:
        Its weight.
    """
    return VOLUMES[shape] * DENSITIES[material]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", metavar="FILE", help="a picture (default: a drawn scene)")
    parser.add_argument("--ask", default="what does the red one weigh in glass?", metavar="QUESTION")
    parser.add_argument("--model", default="tiny", metavar="DIR")
    args = parser.parse_args(argv)
    from training.data.scenes import render, scene

    agent = Agent.from_pretrained(args.model)
    agent.register_tool(weigh, limits=Limits(seconds=5), arguments={
        "shape": AskModel("what shape is the {colour} one?", r"does the (?P<colour>\w+) one weigh"),
        "material": FromQuestion(r"\bin (\w+)")})
    with agent.tools:  # ends the tool's process
        reply = agent.ask(args.image or render(scene("test", 3)), args.ask)
    reply.trace.show()
    print(f"\n{reply}")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
