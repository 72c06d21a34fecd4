"""An agent inside a program of yours: one object that answers, says how sure it is, and keeps its state.

    python examples/embed_in_app.py
    python examples/embed_in_app.py --image scene.png --ask "how many circles are there?" --state seen.state

The program decides what to do with a doubtful answer: here it shows it to a person instead of using it.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from xuravljepa import Agent
from xuravljepa.cli import guard


class Inspector:
    """What an application needs of the agent, and nothing else."""

    def __init__(self, model="tiny", trust=0.9):
        self.agent, self.trust = Agent.from_pretrained(model), trust

    def answer(self, image, question):
        """{"answer", "confidence", "use": whether the program may go on with it, "because"}."""
        reply = self.agent.ask(image, question)
        use = not reply.unsure and reply.confidence >= self.trust
        tools = [call["tool"] for call in reply.tool_calls if call["ok"]]
        return {"answer": reply.answer, "confidence": round(reply.confidence, 3), "use": use,
                "because": f"asked {', '.join(tools)}" if tools else reply.reason}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", metavar="FILE", help="a picture (default: a drawn scene)")
    parser.add_argument("--ask", action="append", metavar="QUESTION", help="can be repeated")
    parser.add_argument("--state", metavar="FILE", help="write there what was seen, for a later run")
    parser.add_argument("--model", default="tiny", metavar="DIR")
    args = parser.parse_args(argv)
    image = args.image
    if image is None:
        from training.data.scenes import render, scene

        image = render(scene("test", 3))
    inspector = Inspector(args.model)
    for question in args.ask or ["what shape is the red one?", "how many circles are there?"]:
        print(json.dumps({"question": question, **inspector.answer(image, question)}))
        image = None  # it is still in view
    if args.state:
        inspector.agent.save_state(args.state)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
