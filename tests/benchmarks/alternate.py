"""Times two sides in turn: each lives in its own process, and only one of them works at a time.

OpenBLAS and torch bring a thread pool each, and two pools in one process wait for each other.  Here the
parent asks one side for a few calls of a case, then the other, round after round, so that whatever else the
machine does falls on both.  A script that uses this calls :func:`main` with its cases.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(description, sides, default_threads=(2, 1)):
    """Run the comparison of a script, or one side of it in a child.

    sides : {"ours": (prepare, cases), name of the peer: (prepare, cases)}; prepare(threads) is called once in
    the child.  cases : {label: make}, equal labels on both sides; make() → (forward, backward or None), where
    forward() is timed and its result goes to backward(result), timed too.
    """
    peer = next(name for name in sides if name != "ours")
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the cases whose label contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=default_threads, help="thread counts to run")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds per turn, at least one call")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="cpu: processor time, all threads together; fair on a busy machine with one thread")
    parser.add_argument("--peer-python", default=sys.executable, help=f"an interpreter with {peer}")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _serve(*sides[options.side], options.threads[0], options.budget, CLOCKS[options.clock])
        return
    labels = [label for label in sides["ours"][1] if options.only in label]
    for threads in options.threads:
        print(f"\n{threads} thread{'s' * (threads > 1)}; medians in ms of {options.clock} time, "
              f"{options.rounds} turns each\n")
        print(f"| op | forward: ours | {peer} | ratio | backward: ours | {peer} | ratio |")
        print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
        children = {name: _start(name, threads, options) for name in sides}
        try:
            for label in labels:
                print(_row(label, _alternate(children, label, options.rounds), peer), flush=True)
        finally:
            for child in children.values():
                child.stdin.close()
                child.wait()


def _start(side, threads, options):
    python = sys.executable if side == "ours" else options.peer_python
    environment = {**os.environ, **dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "XURA_NUM_THREADS"), str(threads))}
    command = [python, sys.argv[0], "--side", side, "--threads", str(threads), "--budget", str(options.budget),
               "--clock", options.clock]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _alternate(children, label, rounds):
    """{side: [(forward seconds, backward seconds or None), ...]} over all turns."""
    found = {side: [] for side in children}
    for _ in range(rounds):
        for side, child in children.items():
            child.stdin.write(label + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                raise SystemExit(f"the side {side!r} ended; its message is above")
            found[side] += json.loads(answer)
    return found


def _row(label, found, peer):
    cells = [label]
    for part in (0, 1):
        ours, other = ([call[part] for call in found[side]] for side in ("ours", peer))
        if None in ours:
            cells += ["", "", ""]
        else:
            a, b = statistics.median(ours), statistics.median(other)
            cells += [f"{a * 1e3:.4g}", f"{b * 1e3:.4g}", f"{a / b:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _serve(prepare, cases, threads, budget, clock):
    """In the child: for each label read, make the case (once, until another is asked for) and time it."""
    prepare(threads)
    label = None
    for line in sys.stdin:
        if line.strip() != label:
            label = line.strip()
            forward = backward = None  # what the case before held may go first
            forward, backward = cases[label]()
            _once(forward, backward, clock)  # compiles
            if sum(filter(None, _once(forward, backward, clock))) < budget:
                _once(forward, backward, clock)
        times, end = [], time.perf_counter() + budget
        while not times or time.perf_counter() < end:
            times.append(_once(forward, backward, clock))
        print(json.dumps(times), flush=True)


def _once(forward, backward, clock):
    start = clock()
    result = forward()
    middle = clock()
    if backward is None:
        return middle - start, None
    backward(result)
    return middle - start, clock() - middle
