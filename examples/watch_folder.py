"""Watch a folder that a camera fills: speak where something changes, remember, and be asked afterwards.

    python examples/watch_folder.py shots --ask "is there a red circle?"
    python examples/watch_folder.py shots --once --recall "how many circles are there?"

What was seen lies in shots/memory and is there in the next run: --recall alone asks without watching.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:  # run by path: import the packages that this script lies beside
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from xuracore.errors import FormatError
from xuravljepa.agent import Agent, SelectiveDecoder, frames_in
from xuravljepa.cli import guard


def arriving(folder, once, seconds=0.5):
    """Pictures of a folder as they come, each when its size no longer grows."""
    known, sizes = set(), {}
    while True:
        for path in frames_in(folder):
            size = path.stat().st_size
            if path not in known and (once or sizes.get(path) == size > 0):
                known.add(path)
                yield path
            sizes[path] = size
        if once:
            break
        time.sleep(seconds)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ask", default="how many circles are there?", metavar="QUESTION")
    parser.add_argument("--recall", metavar="QUESTION", help="in the end, ask this of all that was seen")
    parser.add_argument("--once", action="store_true", help="look at what is there, do not wait for more")
    parser.add_argument("--model", default="tiny", metavar="DIR")
    args = parser.parse_args(argv)
    agent, decoder, frames = Agent.from_pretrained(args.model), SelectiveDecoder(), arriving(args.folder, args.once)
    with agent.open_memory(args.folder / "memory"):
        while args.once or not args.recall:
            try:
                for _, answer, confidence in agent.stream(frames, args.ask, decoder):
                    print(f"change {decoder.decodes}: {answer} ({confidence:.0%} sure)", flush=True)
                break
            except FormatError as error:  # one broken picture does not end the watch
                print(f"skipped: {error}", file=sys.stderr)
        for seen in agent.recall(args.recall, k=100) if args.recall else ():
            print(f"{seen} ({seen.confidence:.0%} sure)")


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
