"""How long a question takes: from the shell, start to exit, and inside a process:  python tests/benchmarks/ask.py

From the shell each run is a process of its own (``python -m xuravljepa.cli ask …``); beside the wall time stands the
processor time of the process and its children, which a busy machine changes less, and the time that Python needs to
import NumPy alone.  The first run of each row does not count.  Inside a process an agent is asked again and again.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = ROOT = str(Path(__file__).resolve().parents[2])

PLAIN, PRICED = "what shape is the red one?", "what does the red one cost at zorba?"
SHELL = {"xura ask, as it is": ([PLAIN], {}), "a question that calls a tool": ([PRICED], {}),
         "four questions": ([PLAIN, "how many circles are there?", "what size is the red one?", PRICED], {}),
         "XURA_KERNELS=numba": ([PLAIN], {"XURA_KERNELS": "numba"})}


def run(command, environment):
    """(wall, processor) seconds of one process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def shell(image, model, runs):
    """Rows (what, median wall, median processor seconds), all measured in turn."""
    base = {name: value for name, value in os.environ.items() if name != "XURA_KERNELS"}
    ask = [sys.executable, "-m", "xuravljepa.cli", "ask", "--model", model, image]
    work = {"Python imports NumPy": ([sys.executable, "-c", "import numpy"], base)}
    work |= {what: (ask + questions, base | more) for what, (questions, more) in SHELL.items()}
    times = {what: [] for what in work}
    for turn in range(runs + 1):
        for what, (command, environment) in work.items():
            found = run(command, environment)
            if turn:
                times[what].append(found)
    return [(what, *map(statistics.median, zip(*found))) for what, found in times.items()]


def inside(picture, other, model, count):
    """Rows (what, median wall, median processor seconds) in this process."""
    from xuravljepa import Agent

    agent = Agent.from_pretrained(model)
    work = {"the same picture": lambda i: agent.ask(None, PLAIN),
            "a new picture each time": lambda i: agent.ask((picture, other)[i % 2], PLAIN),
            "a question that calls a tool": lambda i: agent.ask(None, PRICED)}
    agent.ask(picture, PLAIN)
    for what, ask in work.items():
        ask(1), ask(0)
        times = []
        for i in range(count):
            marks = time.perf_counter(), time.process_time()
            ask(i)
            times.append((time.perf_counter() - marks[0], time.process_time() - marks[1]))
        yield what, *map(statistics.median, zip(*times))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="processes for each row (default 11)")
    parser.add_argument("--questions", type=int, default=100, help="for each row inside a process (default 100)")
    parser.add_argument("--model", default="tiny", metavar="DIR")
    options = parser.parse_args()
    from PIL import Image

    from training.data.scenes import render, scene

    pictures = [render(scene("test", number)) for number in (3, 4)]
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/scene.png"
        Image.fromarray(pictures[0]).save(image)
        print("| from the shell | median s | processor s |\n|---|--:|--:|")
        for what, wall, processor in shell(image, options.model, options.runs):
            print(f"| {what} | {wall:.2f} | {processor:.2f} |", flush=True)
    print("\n| inside a process | median ms | processor ms |\n|---|--:|--:|")
    for what, wall, processor in inside(*pictures, options.model, options.questions):
        print(f"| {what} | {1e3 * wall:.1f} | {1e3 * processor:.1f} |", flush=True)


if __name__ == "__main__":
    main()
