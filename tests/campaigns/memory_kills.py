"""Kill a process that writes to a visual memory, again and again:  python tests/campaigns/memory_kills.py --help

Each round starts a writer, which reports the number of every record once it is written, and sends it SIGKILL
at a random moment.  In every other round the system takes 100 bytes a write, so that many records are torn.
Then every record that was reported must be there with its key, its texts and its
picture, and the memory must take further ones.  Exit status 1 if anything was lost.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from xuravljepa.agent.memory import MemoryConfig, VisualMemory

WIDTH = 32
# Small segments, so that many kills meet a change of segments or a removal.
CONFIG = MemoryConfig(same=0.0, segment_bytes=40_000, max_bytes=400_000, sync=False)


def content(number):
    """(key, picture, answer) that belong to a record's number."""
    rng = np.random.default_rng(number)
    side = 4 + number % 60
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return rng.standard_normal(WIDTH).astype(np.float32), picture, f"answer {number}" * (number % 50)


def write_for_ever(folder, pipe, in_pieces):
    """Remember until killed."""
    warnings.simplefilter("ignore")
    if in_pieces:
        write = os.write
        os.write = lambda file, data: write(file, data[:100])
    memory = VisualMemory(folder, WIDTH, CONFIG)
    os.write(pipe, b"-1 ")  # ready
    number = memory.newest(1)[0].number + 1 if len(memory) else 0
    while True:
        key, picture, answer = content(number)
        entry = memory.add(key, picture, "campaign", "what?", answer, 0.5)
        os.write(pipe, f"{entry.number} ".encode())
        number = entry.number + 1


def is_right(memory, entry):
    """Whether a memory is what was written under its number."""
    key, picture, answer = content(entry.number)
    nearest, cosine = memory.search(key, 1)[0]
    same = np.array_equal(memory.picture(entry.number), picture)
    return nearest is entry and cosine > 0.9999 and entry.answer == answer[:2000] and same


def kill_writers(folder, kills, rng):
    """(records reported, lost or wrong ones, torn tails cut off, records left) after so many kills."""
    reported = lost = torn = 0
    newest = -1
    for turn in range(kills):
        reading, writing = os.pipe()
        writer = os.fork()
        if not writer:
            try:
                write_for_ever(folder, writing, turn % 2)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb", buffering=0) as pipe:
            said = pipe.read(3)
            time.sleep(rng.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
            said += pipe.read()
        numbers = [int(word) for word in said.decode().split()[1:]]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with VisualMemory(folder, WIDTH, CONFIG) as memory:
                there = {entry.number: entry for entry in memory}
                # The oldest may have been removed by retention; what is kept has no gap.
                wanted = [number for number in numbers if number >= min(there, default=0)]
                gaps = max(there, default=-1) - min(there, default=0) + 1 - len(there)
                lost += sum(number not in there for number in wanted) + gaps
                lost += sum(not is_right(memory, there[number]) for number in wanted if number in there)
                lost += max(there, default=-1) < max([newest, *numbers])
                newest = max(there, default=-1)
        reported += len(numbers)
        torn += len(warned)
    return reported, lost, torn, len(there)


def main(arguments=None):
    """Run the campaign and print a Markdown table; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="writers to kill (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        reported, lost, torn, left = kill_writers(folder, options.kills, random.Random(options.seed))
    print("| kills | records completed | lost or wrong | torn tails cut off | left by retention |\n"
          "|--:|--:|--:|--:|--:|")
    print(f"| {options.kills} | {reported} | {lost} | {torn} | {left} |")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
